//! What is adopted, what is refused, and what a refusal leaves behind.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::os::unix::fs::PermissionsExt;

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use common::{Host, ip, on_a_host};
use ebpf_policy::model::{ClusterView, Pod, Ranges};
use ebpf_policy::{Attached, Enforcer, Error, Options, Role, compile};
use margay_bpf::layout::{Config, LAYOUT_VERSION};

const PORT: u16 = 8080;

/// Two pods that may talk, under an enforcer that has gone.
fn two_pods(host: &Host) -> (common::Pod, common::Pod, ebpf_policy::Compiled) {
    let (a, b) = (host.pod("a", &["10.1.0.1"]), host.pod("b", &["10.1.0.2"]));
    b.serve_tcp(PORT);
    let pods = [&a, &b].map(|pod| Pod { namespace: "x".into(), name: pod.name.clone(), ..Pod::default() });
    let view = ClusterView { pods: pods.map(Into::into).into(), ..ClusterView::default() };
    let compiled = compile(&view, &[a.endpoint("x"), b.endpoint("x")], &Ranges::default());
    let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
    for pod in [&a, &b] {
        enforcer.attach_pod(&pod.ifname).unwrap();
    }
    enforcer.apply(&compiled).unwrap();
    assert!(a.reaches(&b, PORT));
    (a, b, compiled)
}

fn set_layout_version(host: &Host, layout: u32) {
    let data = MapData::from_pin(host.pin_dir().join("maps/CONFIG")).unwrap();
    let mut config = Array::<_, Config>::try_from(Map::from_map_data(data).unwrap()).unwrap();
    let revision = config.get(&0, 0).unwrap().revision;
    config.set(0, Config { layout, revision }, 0).unwrap();
}

/// Puts a map of another shape in the place of `ADDRESSES`.
fn replace_addresses_map(host: &Host) {
    let path = host.pin_dir().join("maps/ADDRESSES");
    std::fs::remove_file(&path).unwrap();
    HashMap::<MapData, u32, u64>::create(16, 0).unwrap().pin(&path).unwrap();
}

#[test]
fn maps_of_another_layout_are_refused_and_left_in_force() {
    on_a_host(|host| {
        let (a, b, _) = two_pods(host);
        set_layout_version(host, LAYOUT_VERSION + 1);
        let error = Enforcer::open(&Options::new(host.pin_dir())).unwrap_err();
        assert!(matches!(error, Error::Incompatible { field: "layout version", .. }), "{error}");
        assert!(error.to_string().contains("maps/CONFIG"), "{error}");
        assert!(a.reaches(&b, PORT));
    });
}

#[test]
fn a_map_of_another_shape_is_refused_by_name() {
    on_a_host(|host| {
        let (a, b, _) = two_pods(host);
        replace_addresses_map(host);
        let error = Enforcer::open(&Options::new(host.pin_dir())).unwrap_err();
        assert!(matches!(error, Error::Incompatible { .. }), "{error}");
        assert!(error.to_string().contains("maps/ADDRESSES"), "{error}");
        assert!(a.reaches(&b, PORT));
    });
}

#[test]
fn a_missing_map_is_refused_and_a_half_made_set_of_maps_is_made_anew() {
    on_a_host(|host| {
        let (a, b, _) = two_pods(host);
        std::fs::remove_file(host.pin_dir().join("maps/RANGES")).unwrap();
        let error = Enforcer::open(&Options::new(host.pin_dir())).unwrap_err();
        assert!(error.to_string().contains("RANGES"), "{error}");
        assert!(a.reaches(&b, PORT));
    });
    on_a_host(|host| {
        // An agent died between making its maps and putting them in place.
        let staging = host.pin_dir().join("maps_new");
        std::fs::create_dir_all(&staging).unwrap();
        HashMap::<MapData, u32, u64>::create(16, 0).unwrap().pin(staging.join("ADDRESSES")).unwrap();
        assert!(!Enforcer::open(&Options::new(host.pin_dir())).unwrap().adopted());
        assert!(!staging.exists());
        assert!(Enforcer::open(&Options::new(host.pin_dir())).unwrap().adopted());
    });
}

#[test]
fn replacing_incompatible_maps_closes_pods_until_the_next_apply() {
    on_a_host(|host| {
        let (a, b, compiled) = two_pods(host);
        set_layout_version(host, LAYOUT_VERSION + 1);
        let options = Options { replace_incompatible: true, ..Options::new(host.pin_dir()) };
        let mut enforcer = Enforcer::open(&options).unwrap();
        assert!(!enforcer.adopted());
        assert_eq!(enforcer.attached().unwrap().len(), 2);
        assert!(a.is_cut_off(&b, PORT));
        enforcer.apply(&compiled).unwrap();
        assert!(a.reaches(&b, PORT));
        drop(enforcer);
        assert!(Enforcer::open(&options).unwrap().adopted());
    });
}

#[test]
fn pins_are_for_root_only_and_go_on_a_bpffs_only() {
    on_a_host(|host| {
        std::fs::create_dir(host.pin_dir()).unwrap();
        std::fs::set_permissions(host.pin_dir(), PermissionsExt::from_mode(0o777)).unwrap();
        let _enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
        let mode = std::fs::metadata(host.pin_dir()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);

        let elsewhere = tempfile::tempdir().unwrap();
        let error = Enforcer::open(&Options::new(elsewhere.path().join("pins"))).unwrap_err();
        assert!(matches!(error, Error::NotBpffs(_)), "{error}");
    });
}

#[test]
fn a_device_that_has_gone_is_forgotten_and_one_that_never_was_is_named() {
    on_a_host(|host| {
        let (a, b, _) = two_pods(host);
        ip(&format!("link del {}", a.ifname));
        let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
        let left = Attached { ifindex: b.ifindex, ifname: b.ifname.clone(), role: Role::Pod };
        assert_eq!(enforcer.attached().unwrap(), [left]);
        assert_eq!(std::fs::read_dir(host.pin_dir().join("links")).unwrap().count(), 2);
        enforcer.detach("nosuchdevice").unwrap();
        let error = enforcer.attach_pod("nosuchdevice").unwrap_err();
        assert!(error.to_string().contains("nosuchdevice"), "{error}");
    });
}

#[test]
fn attaching_twice_is_attaching_once() {
    on_a_host(|host| {
        let (a, _b, _) = two_pods(host);
        let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
        enforcer.attach_pod(&a.ifname).unwrap();
        enforcer.attach_pod(&a.ifname).unwrap();
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx(&a.ifname, side).unwrap();
            assert_eq!(programs.len(), 1, "{side:?}");
        }
    });
}
