//! The DaemonSets' containers, run on hosts of the lab with the arguments, rights and volumes of the manifests.

use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::manifests::PodStatus;
use netns_tests::wait;
use serde_json::{Value, json};

use crate::common::{all_between, assert_reach, bins, end_of, nodes, pings};
use crate::container::Pod;
use crate::support::{documents, kustomize, manifests};

fn set(overlay: &str, name: &str) -> Value {
    let all = documents(&kustomize(overlay));
    let found = all.into_iter().find(|o| o["kind"] == "DaemonSet" && o["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("{overlay} has no {name}"))
}

const DEVICES: [&str; 2] = ["margay0", "margay1"];

fn until_ready(pod: &Pod<'_>) {
    for device in DEVICES {
        wait::until(format!("{device} of {} to be ready", pod.name), PATIENCE, || {
            pod.is_ready(device).map(Some)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", pod.host.log(&pod.unit(device))));
    }
}

#[test]
fn a_rolling_update_of_both_sets_under_the_shipped_rights_loses_no_packet() {
    let lab = Lab::up(nodes("ab", ""), &bins()).unwrap();
    let host = lab.host("a").unwrap();
    let (datapath, agent) = (set("overlays/kubeadm", "mesh-datapath"), set("overlays/kubeadm", "mesh-agent"));
    let datapath = |name| Pod { host, set: &datapath, name };
    let agent = |name| Pod { host, set: &agent, name };

    // From systemd's units to pods.
    for unit in netns_tests::lab::UNITS {
        host.stop_unit(unit).unwrap();
    }
    let (one, first) = (datapath("one"), agent("first"));
    DEVICES.into_iter().for_each(|device| one.start(device));
    until_ready(&one);
    first.start("mesh-agent");
    lab.settle_node("a", PATIENCE).unwrap_or_else(|error| {
        panic!("{error:#}\n{}", host.log(&first.unit("mesh-agent")));
    });
    assert_reach(&all_between(&lab, "pa", "pb"));

    // The datapath: the new pod first.
    let two = datapath("two");
    let runs = [pings(&lab, "pa", "pb", false, 2500), pings(&lab, "pb", "pa", true, 2500)];
    DEVICES.into_iter().for_each(|device| two.start(device));
    until_ready(&two);
    for device in DEVICES {
        let (pid, restarts) = host.unit(&one.unit(device)).unwrap();
        assert!(pid.is_some() && restarts == 0, "{device}: it ended when it had passed its device on");
        host.stop_unit(&one.unit(device)).unwrap();
    }
    // The agent: the old pod first.
    host.stop_unit(&first.unit("mesh-agent")).unwrap();
    let second = agent("second");
    second.start("mesh-agent");
    lab.settle_node("a", PATIENCE).unwrap();
    for run in runs {
        let (sent, received) = end_of(run);
        assert_eq!((sent, received), (2500, 2500));
    }
    until_ready(&two);
    assert_reach(&all_between(&lab, "pa", "pb"));
    let health = "http://127.0.0.1:9475/readyz";
    host.run(&["curl", "-fsS", health]).unwrap();
}

#[test]
fn the_agents_container_can_do_all_that_pods_need() {
    // CNI ADD with both families enters a namespace, sets sysctls there and attaches policy.
    let policy = "
policies:
  - apiVersion: networking.k8s.io/v1
    kind: NetworkPolicy
    metadata: {name: only-b, namespace: d}
    spec:
      podSelector: {matchLabels: {app: a}}
      ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]
";
    let mut lab = Lab::up(nodes("ab", policy), &bins()).unwrap();
    let agent = set("overlays/kubeadm", "mesh-agent");
    {
        let host = lab.host("a").unwrap();
        host.stop_unit("mesh-agent").unwrap();
        let pod = Pod { host, set: &agent, name: "first" };
        pod.start("mesh-agent");
        lab.settle_node("a", PATIENCE).unwrap_or_else(|error| {
            panic!("{error:#}\n{}", host.log(&pod.unit("mesh-agent")));
        });
    }
    let spec = lab.pod("d", "pa").unwrap().spec.clone();
    lab.remove_pod("d", "pa").unwrap();
    lab.add_pods(&[(spec, PodStatus::default())]).unwrap();
    assert_reach(&all_between(&lab, "pa", "pb"));
}

#[test]
fn the_installer_of_each_overlay_puts_files_where_the_runtime_looks() {
    let lab = Lab::plug(nodes("a", ""), &bins()).unwrap();
    let host = lab.host("a").unwrap();
    let conflist = std::fs::read(manifests().join("components/cni/10-margay.conflist")).unwrap();
    host.write("/run/configmaps/mesh-cni/10-margay.conflist", &conflist).unwrap();
    let flannel =
        json!({"cniVersion": "0.3.1", "name": "cbr0", "plugins": [{"type": "flannel"}, {"type": "portmap"}]});
    for (overlay, expected) in [
        ("kubeadm", "10-margay.conflist"),
        ("k3s", "10-margay.conflist"),
        ("flannel", "05-margay-flannel.conflist"),
    ] {
        let mut set = set(&format!("overlays/{overlay}"), "mesh-agent");
        // Below /run of this host: what is elsewhere is the machine's.
        let mut paths = Vec::new();
        for volume in set["spec"]["template"]["spec"]["volumes"].as_array_mut().unwrap() {
            if volume["name"].as_str().is_some_and(|name| name.starts_with("cni-"))
                && volume["hostPath"].is_object()
            {
                let path = volume["hostPath"]["path"].as_str().unwrap().to_owned();
                volume["hostPath"]["path"] = json!(format!("/run/disk-{overlay}{path}"));
                paths.push(format!("/run/disk-{overlay}{path}"));
            }
        }
        let [bin, net] = paths.as_slice() else { panic!("{overlay}: {paths:?}") };
        for plugin in ["portmap", "bandwidth", "flannel"] {
            host.write(&format!("{bin}/{plugin}"), b"x").unwrap();
        }
        host.write(&format!("{net}/10-flannel.conflist"), flannel.to_string().as_bytes()).unwrap();
        let pod = Pod { host, set: &set, name: overlay };
        for _ in 0..2 {
            pod.run("install-cni").unwrap();
        }
        let list = std::fs::read(host.path(&format!("{net}/{expected}"))).unwrap();
        let list: Value = serde_json::from_slice(&list).unwrap();
        let types: Vec<&str> =
            list["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
        match overlay {
            "flannel" => assert_eq!(types, ["flannel", "portmap", "mesh-cni"]),
            _ => assert_eq!(types, ["mesh-cni", "portmap", "bandwidth"]),
        }
        let version = host.run_with(
            &["env", "CNI_COMMAND=VERSION", &format!("{bin}/mesh-cni")],
            br#"{"cniVersion":"1.0.0"}"#,
        );
        assert!(version.unwrap().contains("supportedVersions"));

        // And away again.
        let mut cleanup = self::set("cleanup", "margay-cleanup");
        for volume in cleanup["spec"]["template"]["spec"]["volumes"].as_array_mut().unwrap() {
            match volume["name"].as_str().unwrap() {
                "cni-bin" => volume["hostPath"]["path"] = json!(bin),
                "cni-net" => volume["hostPath"]["path"] = json!(net),
                _ => {}
            }
        }
        Pod { host, set: &cleanup, name: "cleanup" }.run("uninstall-cni").unwrap();
        let left = |path: &str| {
            let mut names: Vec<String> = std::fs::read_dir(host.path(path))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(left(net), ["10-flannel.conflist"]);
        assert_eq!(left(bin), ["bandwidth", "flannel", "portmap"]);
    }
}

#[test]
fn the_cleanup_leaves_a_node_as_it_was() {
    let mut lab = Lab::up(nodes("ab", ""), &bins()).unwrap();
    lab.remove_pod("d", "pa").unwrap();
    let host = lab.host("a").unwrap();
    for unit in netns_tests::lab::UNITS {
        host.stop_unit(unit).unwrap();
    }
    assert!(
        host.run(&["ip", "-o", "link"]).unwrap().contains("margay0"),
        "the device stays until it is cleaned up"
    );
    let set = set("cleanup", "margay-cleanup");
    Pod { host, set: &set, name: "cleanup" }.run("cleanup").unwrap();
    let links = host.run(&["ip", "-o", "link"]).unwrap();
    assert!(!links.contains("margay") && !links.contains("mgy"), "{links}");
    let rules = host.run(&["ip", "rule"]).unwrap();
    assert!(!rules.contains("4207") && !rules.contains("4208"), "{rules}");
    assert_eq!(host.run(&["ip", "route", "show", "table", "all", "proto", "142"]).unwrap(), "");
    assert_eq!(host.run(&["nft", "list", "tables"]).unwrap(), "");
    assert!(!host.path("/sys/fs/bpf/margay").exists());
    assert_eq!(host.run(&["find", "/var/lib/margay", "-mindepth", "1"]).unwrap(), "");
}
