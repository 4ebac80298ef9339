//! Keys change under traffic: on a schedule, by order, while nodes join, are cut off and are killed, with and without
//! preshared keys. Real programs, real packets, and every one of them counted.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;
#[path = "common/flood.rs"]
mod flood;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use common::{all_between, assert_cut, assert_reach, bins};
use flood::{Flood, Stream};
use mesh_api::defaults::{CONFIG, DEVICES, MANIFESTS, METRICS_ADDRESS, STATE_DIR};
use mesh_api::status::{PeerState, RotationStatus, Status};
use netns_tests::capture::Capture;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::netns::Netns;
use netns_tests::{spec, wait};
use serde_json::{Value, json};

const CANARY: &[u8] = b"margay-canary";
/// Several rotations, each a few seconds of waiting for others.
const LONG: Duration = Duration::from_secs(120);
const EVERY: Duration = Duration::from_millis(5);
/// As short as rotations can be: a schedule of 30 s in a fifth of the time.
const FAST: &str = "{interval: 6s, jitter: 1s, grace: 1s, patience: 5s}";
const UNSCHEDULED: &str = "{jitter: 1s, grace: 1s, patience: 5s}";

/// Nodes of these names, a pod `pNAME` on each of them but those that are `bare`.
fn mesh(nodes: &[&str], bare: &[&str], rotation: &str) -> spec::Lab {
    let mut text = String::from("name: rotation\nnodes:\n");
    for (index, name) in (1..).zip(nodes) {
        text += &format!(
            "  - {{name: {name}, ips: [192.0.2.{index}, '2001:db8::{index}'], podCIDRs: [10.244.{index}.0/24, 'fd00:10:244:{index}::/64']}}\n"
        );
    }
    text += "pods:\n";
    for name in nodes.iter().filter(|name| !bare.contains(name)) {
        text += &format!(
            "  - {{namespace: d, name: p{name}, node: {name}, ports: [{{port: 8080}}, {{port: 8080, protocol: UDP}}]}}\n"
        );
    }
    text += &format!("mesh: {{rotation: {rotation}}}\n");
    spec::Lab::parse(&text).unwrap()
}

/// A lab whose wire is captured from before the first address.
fn watched(spec: spec::Lab) -> (Lab, Capture) {
    let mut lab = Lab::plug(spec, &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820, 51821], &[CANARY, b"margay-probe"]).unwrap();
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    lab.settle(PATIENCE).unwrap();
    lab.start_pods().unwrap();
    (lab, capture)
}

fn ip_of(lab: &Lab, pod: &str, v6: bool) -> IpAddr {
    *lab.pod("d", pod).unwrap().ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap()
}

fn netns(lab: &Lab, pod: &str) -> Netns {
    lab.pod("d", pod).unwrap().netns.clone()
}

/// Both families, from the first of each pair of pods to the second.
fn floods(lab: &Lab, pairs: &[(&str, &str)]) -> Vec<Flood> {
    let one =
        |(from, to): &(&str, &str), v6| Flood::start(&netns(lab, from), ip_of(lab, to, v6), EVERY, CANARY);
    pairs.iter().flat_map(|pair| [one(pair, false), one(pair, true)]).collect()
}

fn stream(lab: &Lab, from: &str, to: &str) -> Stream {
    Stream::start(&netns(lab, from), &netns(lab, to), SocketAddr::new(ip_of(lab, to, true), 9999))
}

fn rotation(lab: &Lab, node: &str) -> anyhow::Result<RotationStatus> {
    Ok(lab.agent(node)?.status()?.rotation)
}

fn epoch(rotation: &RotationStatus) -> u64 {
    rotation.keys.first().map_or(0, |key| key.epoch)
}

/// Waits until it holds on all of these nodes.
fn until_all(lab: &Lab, nodes: &[&str], what: &str, holds: impl Fn(&RotationStatus) -> bool) {
    for node in nodes {
        let done = wait::until(format!("{node}: {what}"), LONG, || {
            let rotation = rotation(lab, node)?;
            anyhow::ensure!(holds(&rotation), "{rotation:?}");
            Ok(Some(()))
        });
        done.unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs(node)));
    }
}

/// One key on each, of one epoch, which is given.
fn until_steady(lab: &Lab, nodes: &[&str], least: u64) -> u64 {
    wait::until("all nodes to be steady at one epoch", LONG, || {
        let all: Vec<RotationStatus> =
            nodes.iter().map(|node| rotation(lab, node)).collect::<Result<_, _>>()?;
        let epochs: BTreeSet<u64> = all.iter().map(epoch).collect();
        let steady = all.iter().all(|one| one.phase == "steady" && one.settled && one.keys[0].announced);
        anyhow::ensure!(steady && epochs.len() == 1 && epochs.first() >= Some(&least), "{all:?}");
        Ok(epochs.first().copied())
    })
    .unwrap_or_else(|error| {
        panic!("{error:?}\n{}", nodes.iter().map(|node| lab.logs(node)).collect::<String>())
    })
}

/// What `/metrics` of a node says, by name with labels.
fn metrics(lab: &Lab, node: &str) -> BTreeMap<String, f64> {
    let host = lab.host(node).unwrap();
    let at: SocketAddr = METRICS_ADDRESS.parse().unwrap();
    let mut stream = host.netns().run(|| TcpStream::connect(at)).unwrap().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: margay\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = |line: &str| {
        let (name, value) = line.trim().rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(line).collect()
}

/// Takes the schedule away, so that what there is can be looked at.
fn stop_schedule(lab: &mut Lab) {
    let mut object = lab.objects(|kind| kind == "MeshConfiguration").pop().unwrap();
    object["spec"]["rotation"].as_object_mut().unwrap().remove("interval");
    lab.put(object).unwrap();
}

/// Private keys on a node's disk, by file.
fn keys_on_disk(lab: &Lab, node: &str) -> BTreeMap<String, String> {
    let host = lab.host(node).unwrap();
    let files = host.run(&["ls", STATE_DIR]).unwrap();
    let keys = files.lines().filter(|name| *name == "key" || name.starts_with("key-"));
    keys.map(|name| (name.to_owned(), host.run(&["cat", &format!("{STATE_DIR}/{name}")]).unwrap())).collect()
}

/// Nothing of a former key is left: one file, one device with it, and the other device without key and peers.
fn assert_wiped(lab: &Lab, node: &str, former: &BTreeMap<String, String>) {
    let host = lab.host(node).unwrap();
    let rotation = rotation(lab, node).unwrap();
    let now = keys_on_disk(lab, node);
    assert_eq!(now.len(), 1, "{:?} on {node}", now.keys());
    assert!(former.values().all(|key| !now.values().any(|now| now == key)), "a key outlives its epoch");
    for device in DEVICES {
        let key = host.run(&["wg", "show", device, "private-key"]).unwrap();
        let peers = host.run(&["wg", "show", device, "peers"]).unwrap();
        if device == rotation.keys[0].device {
            assert_eq!(
                (key.trim(), peers.lines().count()),
                (now.values().next().unwrap().trim(), lab.node_names().len() - 1)
            );
        } else {
            assert_eq!((key.trim(), peers.trim()), ("(none)", ""), "{device} on {node}");
        }
    }
}

/// Status, `meshctl keys` and metrics say the same: one key, nothing waits, every peer has a session.
fn assert_told(lab: &Lab, node: &str, completed: u64) {
    let status: Status = lab.agent(node).unwrap().status().unwrap();
    let rotation = &status.rotation;
    assert!(rotation.waiting.is_empty() && rotation.blocked.is_none(), "{rotation:?}");
    assert!(rotation.completed >= completed, "{node}: {rotation:?}");
    assert!(
        status.peers.iter().all(|peer| peer.state == PeerState::Up && peer.device == rotation.keys[0].device)
    );
    let json = lab.host(node).unwrap().run(&["meshctl", "keys", "-o", "json"]).unwrap();
    let told: RotationStatus = serde_json::from_str(&json).unwrap();
    assert_eq!((&told.keys, told.phase.as_str()), (&rotation.keys, "steady"));
    let table = lab.host(node).unwrap().run(&["meshctl", "keys"]).unwrap();
    assert!(table.contains(&rotation.keys[0].public_key) && table.contains("Phase     steady"), "{table}");
    let metrics = metrics(lab, node);
    let epochs: Vec<_> =
        metrics.iter().filter(|(name, _)| name.starts_with("margay_rotation_epoch{")).collect();
    assert_eq!(epochs.len(), 1, "{epochs:?}");
    assert_eq!(*epochs[0].1, epoch(rotation) as f64);
    assert_eq!(metrics["margay_rotation_phase{phase=\"steady\"}"], 1.0);
    assert!(metrics["margay_rotation_completed_total{}"] >= completed as f64);
    let waiting: f64 = metrics
        .iter()
        .filter(|(name, _)| name.starts_with("margay_rotation_waiting_peers"))
        .map(|(_, value)| value)
        .sum();
    assert_eq!(waiting, 0.0);
}

#[test]
fn every_node_changes_its_key_on_schedule_and_no_packet_is_lost() {
    let (mut lab, capture) = watched(mesh(&["a", "b", "c"], &[], FAST));
    let nodes = ["a", "b", "c"];
    let former: Vec<_> = nodes.iter().map(|node| keys_on_disk(&lab, node)).collect();
    let mut floods = floods(&lab, &[("pa", "pb"), ("pb", "pc"), ("pc", "pa")]);
    // The nodes' own ends of the tunnel too, which move from device to device.
    floods.push(Flood::start(&netns(&lab, "pa"), "10.244.2.1".parse().unwrap(), EVERY, CANARY));
    floods.push(Flood::start(&netns(&lab, "pa"), "fd00:10:244:2::1".parse().unwrap(), EVERY, CANARY));
    let streams = [stream(&lab, "pa", "pb"), stream(&lab, "pc", "pa")];
    until_all(&lab, &nodes, "three rotations", |one| one.completed >= 3 && epoch(one) >= 4);
    stop_schedule(&mut lab);
    until_steady(&lab, &nodes, 4);
    for flood in floods {
        flood.assert_complete(1000);
    }
    for stream in streams {
        assert!(stream.assert_complete() > 1 << 20);
    }
    for (node, former) in nodes.iter().zip(&former) {
        assert_wiped(&lab, node, former);
        assert_told(&lab, node, 3);
    }
    let seen = capture.stop();
    assert!(seen.mesh > 1000);
    seen.check().unwrap();
}

#[test]
fn a_node_that_joins_while_keys_change_disturbs_nobody() {
    let (mut lab, capture) = watched(mesh(&["a", "b", "c", "d"], &["d"], FAST));
    let nodes = ["a", "b", "c", "d"];
    // d has been there and is no more: what joins is another node of its name.
    let host = lab.host("d").unwrap();
    host.stop_unit("mesh-agent").unwrap();
    host.run(&["mesh-agent", "cleanup", "--purge"]).unwrap();
    for node in ["a", "b", "c"] {
        lab.host(node).unwrap().remove(&format!("{MANIFESTS}/nodes/d.margay.yaml")).unwrap();
    }
    let floods = floods(&lab, &[("pa", "pb"), ("pb", "pc")]);
    let stream = stream(&lab, "pa", "pc");
    let others = ["a", "b", "c"];
    until_all(&lab, &others, "a rotation without d", |one| one.completed >= 1 && epoch(one) >= 2);
    let before = epoch(&rotation(&lab, "a").unwrap());
    lab.start_agent("d").unwrap();
    until_all(&lab, &["d"], "d to have joined and rotated", |one| one.completed >= 1);
    until_all(&lab, &others, "a rotation with d", |one| epoch(one) >= before + 2);
    stop_schedule(&mut lab);
    until_steady(&lab, &nodes, before + 2);
    for flood in floods {
        flood.assert_complete(1000);
    }
    assert!(stream.assert_complete() > 1 << 20);
    for v6 in [false, true] {
        let to = ip_of(&lab, "pa", v6).to_string();
        let ping = lab
            .host("d")
            .unwrap()
            .run(&["ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "2", &to])
            .unwrap();
        assert!(ping.contains(" 3 received"), "{ping}");
    }
    assert_told(&lab, "d", 1);
    capture.stop().check().unwrap();
}

#[test]
fn with_half_the_nodes_out_of_reach_the_others_go_on_and_it_heals() {
    let nodes = ["a", "b", "c", "d"];
    let (mut lab, capture) = watched(mesh(&nodes, &["d"], FAST));
    let across = |lab: &mut Lab, cut: bool| {
        for here in ["a", "b"] {
            for there in ["c", "d"] {
                lab.wire_mut().cut(here, there, cut).unwrap();
            }
        }
        for node in ["c", "d"] {
            lab.carrier().cut(node, cut);
        }
    };
    assert_reach(&all_between(&lab, "pa", "pc"));
    across(&mut lab, true);
    let floods = floods(&lab, &[("pa", "pb"), ("pb", "pa")]);
    let stream = stream(&lab, "pa", "pb");
    let before = epoch(&rotation(&lab, "a").unwrap());
    until_all(&lab, &["a", "b"], "two rotations alone", |one| one.completed >= 2 && epoch(one) >= before + 2);
    assert_cut(&all_between(&lab, "pa", "pc"));
    stop_schedule(&mut lab);
    across(&mut lab, false);
    until_steady(&lab, &nodes, before + 2);
    for flood in floods {
        flood.assert_complete(1000);
    }
    assert!(stream.assert_complete() > 1 << 20);
    wait::until("the halves to talk again", LONG, || {
        let peers = lab.agent("a")?.status()?.peers;
        anyhow::ensure!(peers.len() == 3, "{peers:?}");
        Ok(Some(()))
    })
    .unwrap();
    assert_reach(&all_between(&lab, "pa", "pc"));
    assert_reach(&all_between(&lab, "pb", "pc"));
    capture.stop().check().unwrap();
}

#[test]
fn an_order_moves_all_nodes_and_killed_agents_lose_nothing() {
    let nodes = ["a", "b", "c"];
    let (lab, capture) = watched(mesh(&nodes, &[], UNSCHEDULED));
    let host = lab.host("a").unwrap();
    let manifest = format!("{MANIFESTS}/meshconfiguration_default.json");
    let read = || serde_json::from_str::<Value>(&host.run(&["cat", &manifest]).unwrap()).unwrap();
    let mut wanted = read();
    wanted["spec"]["rotationEpoch"] = json!(1);
    let floods = floods(&lab, &[("pa", "pb"), ("pb", "pc"), ("pc", "pa")]);
    let stream = stream(&lab, "pb", "pa");

    // One manifest is edited; the others follow what the first announces.
    let said = host.run(&["meshctl", "keys", "rotate", "--all", "-o", "json"]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["epoch"], 1);
    assert_eq!(read(), wanted);
    assert_eq!(until_steady(&lab, &nodes, 1), 1);

    // One node by itself: the others follow too.
    let said = lab.host("b").unwrap().run(&["meshctl", "keys", "rotate"]).unwrap();
    assert!(said.contains("this node goes to epoch 2"), "{said}");
    let mut kills = 0;
    wait::until("a rotation through dying agents", LONG, || {
        for node in nodes {
            lab.host(node)?.kill_unit("mesh-agent")?;
            kills += 1;
            // Long enough to take a step or a few, never long enough for all.
            std::thread::sleep(Duration::from_millis(350));
        }
        let all: Vec<u64> =
            nodes.iter().map(|node| epoch(&rotation(&lab, node).unwrap_or_default())).collect();
        anyhow::ensure!(kills >= 24, "{kills} kills, {all:?}");
        Ok(Some(()))
    })
    .unwrap();
    // What was ordered is forgotten with the agent that was killed before it began.
    if until_steady(&lab, &nodes, 1) < 2 {
        lab.host("b").unwrap().run(&["meshctl", "keys", "rotate"]).unwrap();
    }
    until_steady(&lab, &nodes, 2);
    lab.settle(PATIENCE).unwrap();
    for flood in floods {
        flood.assert_complete(1000);
    }
    assert!(stream.assert_complete() > 1 << 20);
    for node in nodes {
        assert_wiped(&lab, node, &BTreeMap::new());
        assert_told(&lab, node, 0);
    }
    // Without the second device a node stays where it is, says so, and goes on when the device is there.
    let idle = DEVICES.into_iter().find(|name| *name != rotation(&lab, "c").unwrap().keys[0].device).unwrap();
    let unit = netns_tests::lab::datapath_unit(idle);
    lab.host("c").unwrap().stop_unit(&unit).unwrap();
    wait::until("c to miss its device", PATIENCE, || {
        let devices = lab.agent("c")?.status()?.devices;
        anyhow::ensure!(devices.iter().any(|one| one.name == idle && one.state == "absent"), "{devices:?}");
        Ok(Some(()))
    })
    .unwrap();
    lab.host("c").unwrap().run(&["meshctl", "keys", "rotate"]).unwrap();
    until_all(&lab, &["c"], "c to be blocked", |one| {
        one.blocked.as_ref().is_some_and(|why| why.reason == "NoDevice")
    });
    assert_eq!(metrics(&lab, "c")["margay_rotation_blocked{reason=\"NoDevice\"}"], 1.0);
    let issues = lab.agent("c").unwrap().status().unwrap().issues;
    assert!(issues.iter().any(|issue| issue.reason == "NoDevice"), "{issues:?}");
    assert_reach(&all_between(&lab, "pa", "pc"));
    let at = epoch(&rotation(&lab, "c").unwrap());
    lab.start_device("c", idle).unwrap();
    until_steady(&lab, &nodes, at + 1);
    capture.stop().check().unwrap();
}

/// Gives a node another secret, or none, and starts its agent anew, as an operator would.
fn configure(lab: &Lab, node: &str, secret: Option<&str>) {
    let host = lab.host(node).unwrap();
    let file = "/etc/margay/secret";
    let mut config = format!("nodeName: {node}\n");
    if let Some(secret) = secret {
        write_secret(lab, node, secret);
        config += &format!("presharedKeyFile: {file}\n");
    }
    host.write(CONFIG, config.as_bytes()).unwrap();
    host.kill_unit("mesh-agent").unwrap();
}

fn write_secret(lab: &Lab, node: &str, secret: &str) {
    let host = lab.host(node).unwrap();
    host.write("/etc/margay/secret.new", secret.as_bytes()).unwrap();
    host.run(&[
        "sh",
        "-c",
        "chmod 600 /etc/margay/secret.new && mv /etc/margay/secret.new /etc/margay/secret",
    ])
    .unwrap();
}

/// Preshared keys of a node's device in use, by peer.
fn preshared(lab: &Lab, node: &str) -> BTreeMap<String, String> {
    let device = rotation(lab, node).unwrap().keys[0].device.clone();
    let text = lab.host(node).unwrap().run(&["wg", "show", &device, "preshared-keys"]).unwrap();
    text.lines().filter_map(|line| line.split_once('\t')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}

#[test]
fn preshared_keys_come_change_and_go_without_loss_and_a_wrong_secret_is_no_peer() {
    let nodes = ["a", "b", "c"];
    let (lab, capture) = watched(mesh(&nodes, &[], UNSCHEDULED));
    let flows = floods(&lab, &[("pa", "pb"), ("pb", "pc"), ("pc", "pa")]);
    let bytes = stream(&lab, "pa", "pb");
    let uses = |lab: &Lab, yes: bool| {
        until_all(lab, &nodes, "the secret", |one| {
            one.phase == "steady" && one.settled && one.keys.iter().all(|key| key.preshared == yes)
        });
        until_steady(lab, &nodes, 0)
    };
    for node in nodes {
        configure(&lab, node, Some("the first secret of this mesh"));
    }
    let first = uses(&lab, true);
    let one = preshared(&lab, "a");
    assert!(first >= 1 && one.len() == 2 && one.values().all(|key| key != "(none)"), "{one:?}");
    assert_ne!(one.values().next(), one.values().last(), "each pair has its own");
    assert!(
        preshared(&lab, "b").values().any(|key| one.values().any(|other| other == key)),
        "both ends have one"
    );

    for node in nodes {
        write_secret(&lab, node, "the second secret of this mesh");
    }
    until_all(&lab, &nodes, "an epoch of the second secret", |now| epoch(now) > first);
    let second = uses(&lab, true);
    let other = preshared(&lab, "a");
    assert!(other.values().all(|key| key != "(none)" && !one.values().any(|old| old == key)));

    for node in nodes {
        configure(&lab, node, None);
    }
    until_all(&lab, &nodes, "an epoch of no secret", |now| epoch(now) > second);
    let third = uses(&lab, false);
    assert!(preshared(&lab, "a").values().all(|key| key == "(none)"));
    for flow in flows {
        flow.assert_complete(1000);
    }
    assert!(bytes.assert_complete() > 1 << 20);
    for node in nodes {
        let host = lab.host(node).unwrap();
        assert!(!host.run(&["ls", STATE_DIR]).unwrap().contains("psk"), "a secret outlives its epoch");
        let said = host
            .run(&["sh", "-c", "meshctl dump; meshctl keys -o json; cat /etc/margay/manifests/nodes/*"])
            .unwrap();
        for secret in one.values().chain(other.values()).map(String::as_str).chain(["secret of this mesh"]) {
            assert!(
                !said.contains(secret) && !host.log("mesh-agent").contains(secret),
                "{node} tells a secret"
            );
        }
    }

    // c comes back as a new node with another secret.
    lab.host("c").unwrap().stop_unit("mesh-agent").unwrap();
    lab.host("c")
        .unwrap()
        .run(&["sh", "-c", &format!("rm -f {STATE_DIR}/key* {STATE_DIR}/rotation.json")])
        .unwrap();
    for node in ["a", "b"] {
        configure(&lab, node, Some("the third secret of this mesh"));
    }
    write_secret(&lab, "c", "some other secret altogether");
    let config = "nodeName: c\npresharedKeyFile: /etc/margay/secret\n";
    lab.host("c").unwrap().write(CONFIG, config.as_bytes()).unwrap();
    until_all(&lab, &["a", "b"], "an epoch of the third secret", |now| {
        epoch(now) > third && now.keys[0].preshared
    });
    lab.start_agent("c").unwrap();
    lab.settle_node("c", PATIENCE).unwrap();
    until_all(&lab, &["c"], "c to have a key", |one| {
        one.keys.first().is_some_and(|key| key.preshared && key.announced)
    });
    assert_reach(&all_between(&lab, "pa", "pb"));
    assert_cut(&all_between(&lab, "pa", "pc"));
    let peers = lab.agent("c").unwrap().status().unwrap().peers;
    assert!(peers.iter().all(|peer| peer.handshake_age_seconds.is_none()), "{peers:?}");
    // With the right one it is in the mesh.
    write_secret(&lab, "c", "the third secret of this mesh");
    wait::until("c to be in the mesh", LONG, || {
        let peers = lab.agent("c")?.status()?.peers;
        anyhow::ensure!(peers.len() == 2 && rotation(&lab, "c")?.phase == "steady", "{peers:?}");
        Ok(Some(()))
    })
    .unwrap();
    wait::until("c to be reached", LONG, || {
        let list: Vec<_> = all_between(&lab, "pa", "pc").into_iter().map(|probe| (probe, false)).collect();
        let outcomes = netns_tests::probe::all(&list)?;
        anyhow::ensure!(
            outcomes.iter().all(|one| *one == netns_tests::probe::Outcome::Allowed),
            "{outcomes:?}"
        );
        Ok(Some(()))
    })
    .unwrap();
    capture.stop().check().unwrap();
}
