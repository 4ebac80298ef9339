//! The tunnel device, which has no Ethernet header, and the event buffer under a flood.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;

use common::packet::Spec;
use common::{eventually, ip, on_a_host};
use ebpf_policy::model::{ClusterView, Ranges};
use ebpf_policy::{AttachMode, Enforcer, Options, Role, compile};

/// A TUN device without packet information.
#[allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
fn tun(name: &str) -> File {
    nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an ifreq of zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request outlives the call.
    unsafe { tunsetiff(file.as_raw_fd(), &request) }.unwrap();
    ip(&format!("link set {name} up"));
    file
}

#[test]
fn forged_sources_out_of_the_tunnel_are_dropped_at_the_device() {
    for attach in [AttachMode::Tcx, AttachMode::Clsact] {
        on_a_host(move |host| {
            let mut device = tun("margay0");
            let mut enforcer = Enforcer::open(&Options { attach, ..Options::new(host.pin_dir()) }).unwrap();
            enforcer.attach_tunnel("margay0").unwrap();
            let ranges = Ranges {
                remote: vec!["10.2.0.0/24".parse().unwrap(), "fd00:2::/64".parse().unwrap()],
                own: vec!["10.1.0.0/24".parse().unwrap()],
            };
            enforcer.apply(&compile(&ClusterView::default(), &[], &ranges)).unwrap();
            for source in ["10.2.0.9", "10.1.0.9", "192.0.2.9"] {
                let packet = Spec::new(source.parse().unwrap(), "10.1.0.1".parse().unwrap(), 17, (1, 2)).ip();
                device.write_all(&packet).unwrap();
            }
            let packet =
                Spec::new("fd00:2::9".parse().unwrap(), "fd00:1::1".parse().unwrap(), 17, (1, 2)).ip();
            device.write_all(&packet).unwrap();
            let count = |reason| {
                let counters = enforcer.counters().unwrap();
                counters.iter().find(|counter| counter.reason == reason).map_or(0, |counter| counter.packets)
            };
            eventually("all four are counted", || {
                count("tunnel") == 2 && count("tunnel_own_source") == 1 && count("tunnel_unknown_source") == 1
            });
            let attached = enforcer.attached().unwrap();
            assert!(
                matches!(attached.as_slice(), [device] if device.role == Role::Tunnel && device.ifname == "margay0")
            );
            enforcer.detach("margay0").unwrap();
            assert!(enforcer.attached().unwrap().is_empty());
        });
    }
}

#[test]
fn events_beyond_the_buffer_are_lost_and_counted() {
    on_a_host(|host| {
        let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
        let packet = Spec::new("192.0.2.9".parse().unwrap(), "10.1.0.1".parse().unwrap(), 17, (1, 2)).ip();
        let sent = 20_000;
        for _ in 0..sent {
            assert!(!enforcer.test_run("tunnel_ingress", 1, 1, &packet).unwrap());
        }
        let names = compile(&ClusterView::default(), &[], &Ranges::default());
        let mut events = enforcer.events().unwrap();
        let received = std::iter::from_fn(|| events.next_event(&names)).count() as u64;
        let lost = enforcer.events_lost().unwrap();
        assert!(received > 0 && lost > 0);
        assert_eq!(received + lost, sent);

        // Read out, it reports again.
        enforcer.test_run("tunnel_ingress", 1, 1, &packet).unwrap();
        let event = events.next_event(&names).unwrap();
        assert_eq!(event.reason, "tunnel_unknown_source");
        assert_eq!(event.source.to_string(), "192.0.2.9");
        assert!(event.time.elapsed().unwrap().as_secs() < 60);
    });
}
