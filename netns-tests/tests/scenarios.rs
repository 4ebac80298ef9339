//! The mesh under trouble: killed agents, datapaths and hosts, partitions, state changed behind its back, bad
//! input. Real programs, real packets, and a capture that must never see a pod's bytes in clear.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{all_between, assert_cut, assert_reach, between, bins, end_of, pings, stream_until, two};
use netns_tests::capture::Capture;
use netns_tests::demo;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::manifests;
use netns_tests::probe::{self, Outcome, Probe};
use netns_tests::spec::Protocol;
use netns_tests::wait;
use serde_json::json;

const CANARY: &[u8] = b"margay-probe";

fn up(more: &str) -> Lab {
    Lab::up(two(more), &bins()).unwrap()
}

/// A lab whose wire is captured from before the first address.
fn watched(more: &str) -> (Lab, Capture) {
    let mut lab = Lab::plug(two(more), &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    lab.settle(PATIENCE).unwrap();
    lab.start_pods().unwrap();
    (lab, capture)
}

/// Probes until all get through: healing may take as long as WireGuard's timers and a little more.
fn assert_heals(lab: &Lab, limit: Duration) {
    wait::until("the mesh to heal", limit, || {
        let list: Vec<(Probe, bool)> =
            all_between(lab, "pa", "pb").into_iter().map(|probe| (probe, false)).collect();
        for ((probe, _), outcome) in list.iter().zip(probe::all(&list)?) {
            anyhow::ensure!(
                outcome == Outcome::Allowed,
                "{} -> {} {}: {outcome}",
                probe.src,
                probe.listener,
                probe.protocol
            );
        }
        Ok(Some(()))
    })
    .unwrap();
}

fn kill_and_wait(lab: &Lab, node: &str, unit: &str) {
    let host = lab.host(node).unwrap();
    let (_, before) = host.unit(unit).unwrap();
    host.kill_unit(unit).unwrap();
    wait::until(format!("{unit} to be started again"), PATIENCE, || {
        let (pid, restarts) = host.unit(unit)?;
        Ok((pid.is_some() && restarts > before).then_some(()))
    })
    .unwrap();
}

#[test]
fn killing_the_agent_in_a_loop_loses_no_packet() {
    let lab = up("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let floods = [false, true].map(|v6| pings(&lab, "pa", "pb", v6, 3000));
    let done = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let stream = scope.spawn(|| stream_until(&lab, "pa", "pb", true, &done));
        for round in 0..6 {
            for node in ["a", "b"] {
                kill_and_wait(&lab, node, "mesh-agent");
            }
            if round % 2 == 1 {
                for node in ["a", "b"] {
                    lab.settle_node(node, PATIENCE).unwrap();
                }
            }
        }
        lab.settle(PATIENCE).unwrap();
        done.store(true, Ordering::SeqCst);
        stream.join().unwrap()
    });
    assert!(sent > 1 << 20, "the stream carried {sent} bytes only");
    for flood in floods {
        assert_eq!(end_of(flood), (3000, 3000));
    }
    assert!(lab.host("a").unwrap().unit("mesh-agent").unwrap().1 >= 6);
}

#[test]
fn a_new_agent_takes_the_running_device_over_without_touching_it() {
    let lab = up("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let host = lab.host("a").unwrap();
    let look = || {
        let device = host.run(&["wg", "show", "margay0", "dump"]).unwrap();
        // Counters and handshake times move by themselves.
        let still: Vec<String> =
            device.lines().map(|line| line.split('\t').take(4).collect::<Vec<_>>().join(" ")).collect();
        let link = host.run(&["ip", "-o", "link", "show", "margay0"]).unwrap();
        let routes = host.run(&["ip", "route", "show", "table", "4207"]).unwrap();
        let programs = host.run(&["bpftool", "net", "show"]).unwrap_or_default();
        (still, link, routes, programs)
    };
    let before = look();
    kill_and_wait(&lab, "a", "mesh-agent");
    lab.settle_node("a", PATIENCE).unwrap();
    assert_eq!(look(), before);
}

#[test]
fn a_host_that_is_killed_and_comes_back_heals_without_a_hand() {
    let (mut lab, capture) = watched("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let key = |lab: &Lab| lab.agent("b").unwrap().status().unwrap().devices[0].public_key.clone();
    let before = key(&lab);
    lab.kill_host("b").unwrap();
    lab.boot_host("b").unwrap();
    assert_eq!(key(&lab), before, "the key outlives the boot");
    assert_heals(&lab, Duration::from_secs(30));
    capture.stop().check().unwrap();
}

#[test]
fn a_dead_datapath_sends_nothing_in_clear_and_comes_back() {
    let (lab, capture) = watched("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let host = lab.host("a").unwrap();
    host.stop_unit("mesh-datapath").unwrap();
    assert!(host.run(&["ip", "link", "show", "margay0"]).is_ok(), "the TUN device outlives its datapath");
    assert_cut(&all_between(&lab, "pa", "pb"));
    wait::until("status to say so", PATIENCE, || {
        let status = lab.agent("a")?.status()?;
        Ok(status.devices.iter().any(|device| device.state != "up").then_some(()))
    })
    .unwrap();
    lab.start_datapath("a").unwrap();
    assert_heals(&lab, Duration::from_secs(30));
    kill_and_wait(&lab, "b", "mesh-datapath");
    assert_heals(&lab, Duration::from_secs(30));
    // While nobody listens on its port, the kernel answers the other side's ciphertext by ICMP, quoting it.
    let seen = capture.stop();
    assert!(seen.canaries.is_empty() && seen.strangers <= 200, "{seen:?}");
    for stranger in &seen.examples {
        assert!(stranger.contains("IP protocol 1,") || stranger.contains("IP protocol 58,"), "{stranger}");
    }
}

#[test]
fn a_partition_heals() {
    let (mut lab, capture) = watched("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    lab.wire_mut().cut("a", "b", true).unwrap();
    assert_cut(&all_between(&lab, "pa", "pb"));
    lab.wire_mut().cut("a", "b", false).unwrap();
    assert_heals(&lab, Duration::from_secs(30));
    capture.stop().check().unwrap();
}

#[test]
fn a_peer_that_leaves_never_gets_its_traffic_in_clear() {
    let (mut lab, capture) = watched("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let node = manifests::node(&lab.spec().nodes[1].clone());
    // Probing all the while, so that the moment of change is probed too.
    let stop = AtomicBool::new(false);
    let probes = all_between(&lab, "pa", "pb");
    std::thread::scope(|scope| {
        let prober = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                for probe in probes.iter().take(4) {
                    probe.attempt(Duration::from_millis(30));
                }
            }
        });
        lab.carrier().cut("b", true);
        lab.delete(&node).unwrap();
        lab.host("a").unwrap().remove("/etc/margay/manifests/nodes/b.margay.yaml").unwrap();
        wait::until("the peer to be gone", PATIENCE, || {
            Ok(lab.agent("a")?.status()?.peers.is_empty().then_some(()))
        })
        .unwrap();
        lab.agent("a").unwrap().enforced(PATIENCE).unwrap();
        stop.store(true, Ordering::SeqCst);
        prober.join().unwrap();
    });
    assert_cut(&[
        between(&lab, "pa", "pb", false, Protocol::Tcp),
        between(&lab, "pa", "pb", true, Protocol::Udp),
    ]);
    lab.carrier().cut("b", false);
    lab.put(node).unwrap();
    assert_heals(&lab, Duration::from_secs(30));
    capture.stop().check().unwrap();
}

#[test]
fn kernel_state_changed_behind_its_back_is_repaired_within_seconds() {
    let lab = up("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let host = lab.host("a").unwrap();
    let text = |argv: &[&str]| host.run(argv).unwrap_or_default();
    let veth = lab.agent("a").unwrap().status().unwrap().endpoints[0].interface.clone();
    let forwarding = "/proc/sys/net/ipv4/ip_forward";
    let damages: Vec<(&str, Vec<&str>, Vec<&str>)> = vec![
        (
            "route to the peer",
            vec!["ip", "route", "del", "10.244.2.0/24", "table", "4207"],
            vec!["ip", "route", "show", "table", "4207"],
        ),
        (
            "routes of IPv6",
            vec!["ip", "-6", "route", "flush", "table", "4207"],
            vec!["ip", "-6", "route", "show", "table", "4207"],
        ),
        ("rule", vec!["ip", "rule", "del", "priority", "30000"], vec!["ip", "rule"]),
        ("rule of IPv6", vec!["ip", "-6", "rule", "del", "priority", "30000"], vec!["ip", "-6", "rule"]),
        (
            "tunnel address",
            vec!["ip", "addr", "flush", "dev", "margay0", "scope", "global"],
            vec!["ip", "-br", "-4", "addr", "show", "margay0"],
        ),
        (
            "nft table",
            vec!["nft", "delete", "table", "inet", "margay"],
            vec!["nft", "list", "table", "inet", "margay"],
        ),
        ("forwarding", vec!["sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"], vec!["cat", forwarding]),
        (
            "link down",
            vec!["ip", "link", "set", "margay0", "down"],
            vec!["sh", "-c", "ip link show margay0 | grep -o 'UP' | head -1"],
        ),
        (
            "MTU",
            vec!["ip", "link", "set", "margay0", "mtu", "1300"],
            vec!["sh", "-c", "ip link show margay0 | grep -o 'mtu [0-9]*'"],
        ),
        (
            "veth down",
            vec!["ip", "link", "set", &veth, "down"],
            vec!["sh", "-c", "ip -br link | grep mgy | grep -c UP"],
        ),
        (
            "peer in the device",
            vec!["sh", "-c", "wg set margay0 peer $(wg show margay0 peers) remove"],
            vec!["wg", "show", "margay0", "allowed-ips"],
        ),
    ];
    let sorted = |text: String| {
        let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_string()).collect();
        lines.sort();
        lines
    };
    for (what, damage, look) in &damages {
        let before = sorted(text(look));
        assert!(!before.is_empty(), "{what}: nothing to damage");
        host.run(damage).unwrap();
        let start = Instant::now();
        wait::until(format!("{what} to be repaired"), Duration::from_secs(10), || {
            let now = sorted(text(look));
            anyhow::ensure!(now == before, "is {now:?}, was {before:?}");
            Ok(Some(()))
        })
        .unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
    }
    assert_heals(&lab, Duration::from_secs(20));
}

#[test]
fn cleanup_takes_all_of_ours_and_nothing_else() {
    let mut lab = up("");
    let host = lab.host("a").unwrap();
    for foreign in [
        &["ip", "route", "add", "198.51.100.0/24", "dev", "eth0", "proto", "77", "table", "4300"][..],
        &["ip", "route", "add", "198.51.101.0/24", "dev", "eth0"],
        &["ip", "rule", "add", "priority", "30011", "lookup", "4300"],
        &["ip", "-6", "rule", "add", "priority", "29999", "lookup", "4300"],
        &["nft", "add", "table", "inet", "somebody"],
        &["ip", "link", "add", "mgyother", "type", "bridge"],
        &["mkdir", "/sys/fs/bpf/somebody"],
    ] {
        host.run(foreign).unwrap();
    }
    lab.remove_pod("d", "pa").unwrap();
    lab.host("a").unwrap().run(&["ip", "link", "set", "mgyother", "name", "br-other"]).unwrap();
    demo::clean_host(&lab, "a").unwrap();
    let host = lab.host("a").unwrap();
    for (look, word) in [
        (&["ip", "route", "show", "table", "4300"][..], "198.51.100.0/24"),
        (&["ip", "route"], "198.51.101.0/24"),
        (&["ip", "rule"], "30011:"),
        (&["ip", "-6", "rule"], "29999:"),
        (&["nft", "list", "tables"], "somebody"),
        (&["ip", "-br", "link"], "br-other"),
        (&["ls", "/sys/fs/bpf"], "somebody"),
        (&["ls", "/etc/margay/manifests"], "node_a.json"),
    ] {
        assert!(host.run(look).unwrap().contains(word), "{look:?} has no {word}");
    }
}

#[test]
fn pods_reach_the_world_masqueraded_and_exceptions_are_not() {
    let mut lab = up("externals:
  - {name: world, ips: [203.0.113.9, '2001:db8:9::9']}
  - {name: office, ips: [198.51.100.9, '2001:db8:8::9']}
mesh:
  masquerade: {exceptCIDRs: [198.51.100.0/24, '2001:db8:8::/64']}
");
    let pod = lab.pod("d", "pa").unwrap().clone();
    let nodes = lab.ips("a").unwrap();
    for host in ["world", "office"] {
        for to in lab.ips(host).unwrap() {
            let pick = |ips: &[IpAddr]| *ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).unwrap();
            let want = if host == "world" { pick(&nodes) } else { pick(&pod.ips) };
            let server = lab
                .host(host)
                .unwrap()
                .netns()
                .run(|| TcpListener::bind(SocketAddr::new(to, 80)))
                .unwrap()
                .unwrap();
            let client =
                pod.netns.run(|| TcpStream::connect_timeout(&SocketAddr::new(to, 80), PATIENCE)).unwrap();
            client.unwrap_or_else(|error| panic!("{host} {to}: {error}"));
            let (_, source) = server.accept().unwrap();
            assert_eq!(source.ip(), want, "{host}");
        }
    }
    lab.remove_pod("d", "pa").unwrap();
}

#[test]
fn bad_manifests_and_announcements_disturb_nobody() {
    let lab = up("");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let host = lab.host("a").unwrap();
    let announcement =
        std::fs::read_to_string(host.path("/etc/margay/manifests/nodes/b.margay.yaml")).unwrap();
    let thief = announcement.replace("name: b", "name: thief").replace("\"b\"", "\"thief\"");
    assert_ne!(thief, announcement);
    let bad: Vec<(&str, Vec<u8>, &str)> = vec![
        ("broken.yaml", b"kind: [".to_vec(), "broken.yaml"),
        ("binary.yaml", vec![0, 255, 7, 0x80], "binary.yaml"),
        ("node-bad.yaml", b"apiVersion: v1\nkind: Node\nmetadata: {name: evil}\nspec: {podCIDRs: [10.244.2.0/250]}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.2}]}\n".to_vec(), "evil"),
        ("policy-bad.yaml", br#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "bad", "namespace": "elsewhere"}, "spec": {"podSelector": {}, "ingress": [{"from": [{}]}]}}"#.to_vec(), "bad"),
        ("nodes/thief.margay.yaml", thief.into_bytes(), "thief"),
    ];
    for (file, content, word) in &bad {
        host.write(&format!("/etc/margay/manifests/{file}"), content).unwrap();
        let agent = lab.agent("a").unwrap();
        agent.sync().unwrap();
        wait::until(format!("an issue that names {word}"), PATIENCE, || {
            let issues = agent.status()?.issues;
            let text = serde_json::to_string(&issues)?;
            anyhow::ensure!(text.contains(word), "{text}");
            Ok(Some(()))
        })
        .unwrap();
        assert_reach(&all_between(&lab, "pa", "pb"));
    }
    for (file, _, _) in &bad {
        host.remove(&format!("/etc/margay/manifests/{file}")).unwrap();
    }
    lab.agent("a").unwrap().enforced(PATIENCE).unwrap();
    wait::until("the issues to be gone", PATIENCE, || {
        let issues = lab.agent("a")?.status()?.issues;
        anyhow::ensure!(issues.is_empty(), "{issues:?}");
        Ok(Some(()))
    })
    .unwrap();
}

#[test]
fn a_carrier_that_is_cut_delays_a_newcomer_and_harms_nobody() {
    let mut lab = up("");
    lab.carrier().cut("b", true);
    kill_and_wait(&lab, "b", "mesh-agent");
    lab.settle(PATIENCE).unwrap();
    assert_reach(&all_between(&lab, "pa", "pb"));
    // Policy still comes by the cluster's objects.
    let spec = json!({"podSelector": {}, "policyTypes": ["Ingress"]});
    lab.put(manifests::policy("d", "closed", spec)).unwrap();
    lab.enforced().unwrap();
    assert_cut(&all_between(&lab, "pa", "pb"));
    let event =
        demo::deny_event(&lab, "b", &lab.pod("d", "pa").unwrap().ips, &lab.pod("d", "pb").unwrap().ips)
            .unwrap();
    assert_eq!((event.direction.as_str(), event.policies), ("ingress", vec!["d/closed".to_string()]));
    lab.carrier().cut("b", false);
}

#[test]
fn policy_stays_as_it_was_while_the_agent_is_dead() {
    let mut lab = up("");
    let spec =
        json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"ports": [{"port": 8080}]}]});
    lab.put(manifests::policy("d", "tcp-only", spec)).unwrap();
    lab.enforced().unwrap();
    lab.host("b").unwrap().stop_unit("mesh-agent").unwrap();
    assert_reach(&[
        between(&lab, "pa", "pb", false, Protocol::Tcp),
        between(&lab, "pb", "pa", true, Protocol::Udp),
    ]);
    let probes =
        [between(&lab, "pa", "pb", false, Protocol::Udp), between(&lab, "pa", "pb", true, Protocol::Sctp)];
    for probe in probes {
        assert_eq!(probe.attempt(Duration::from_secs(1)), Outcome::Dropped);
    }
    lab.start_agent("b").unwrap();
    lab.settle_node("b", PATIENCE).unwrap();
}

#[test]
fn a_lossy_slow_reordering_wire_carries_the_mesh() {
    let lab = up("underlay: {delayMs: 5, lossPercent: 5, reorderPercent: 10}");
    assert_reach(&all_between(&lab, "pa", "pb"));
}

#[test]
fn a_node_behind_nat_is_a_peer() {
    let lab = up("underlay: {nat: [{host: b, public: [198.51.100.7, '2001:db8:7::7']}]}
mesh: {persistentKeepalive: 1}
");
    assert_heals(&lab, Duration::from_secs(30));
}
