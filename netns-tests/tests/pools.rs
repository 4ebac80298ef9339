//! Pod addresses from IPPools: three nodes share two small pools over the real API server, under the rights and admission
//! policies that are shipped, while the API server is away, agents are killed, and a node leaves.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::{CANARY, LONG, SERVER, address, bins, has_issue, has_no_issue, nothing_in_clear, reach};
use mesh_api::ipam::{BlockUsage, Usage};
use netns_tests::capture::Capture;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::manifests::{self, PodStatus};
use netns_tests::pods;
use netns_tests::spec::{self, Port};
use netns_tests::wait;
use serde_json::{Value, json};

/// Blocks of eight: a node keeps four ready at most, so that something is left to borrow.
const V4: &str = "10.50.0.0/27";
const V6: &str = "fd00:50::/123";

fn lab() -> spec::Lab {
    let mut text = "name: pools\nnodes:\n".to_owned();
    for (name, n) in [("a", 1), ("b", 2), ("c", 3)] {
        text += &format!("  - {{name: {name}, ips: [192.0.2.{n}, '2001:db8::{n}']}}\n");
    }
    text += "namespaces: [{name: d}]\n";
    spec::Lab::parse(&(text + SERVER)).unwrap()
}

fn pool(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "margay.io/v1alpha1", "kind": "IPPool", "metadata": {"name": name}, "spec": spec})
}

fn pod(name: &str, node: &str) -> spec::Pod {
    let port = |protocol| Port { name: String::new(), port: 8080, protocol, ..Port::default() };
    spec::Pod {
        namespace: "d".into(),
        name: name.into(),
        node: node.into(),
        ports: [spec::Protocol::Tcp, spec::Protocol::Udp].map(port).into(),
        ..spec::Pod::default()
    }
}

fn add(lab: &mut Lab, names: &[(&str, &str)]) {
    let list: Vec<_> = names.iter().map(|(name, node)| (pod(name, node), PodStatus::default())).collect();
    lab.add_pods(&list).unwrap_or_else(|error| panic!("{error:?}"));
}

fn usage(lab: &Lab, node: &str) -> Usage {
    lab.agent(node).unwrap().get("/v1/ipam").unwrap()
}

/// The blocks of a node, of one family.
fn blocks(usage: &Usage, node: &str, v6: bool) -> Vec<BlockUsage> {
    let of = |block: &&BlockUsage| block.node.as_deref() == Some(node) && block.cidr.addr().is_ipv6() == v6;
    usage.blocks.iter().filter(of).cloned().collect()
}

fn borrowed(usage: &Usage, v6: bool) -> u64 {
    let of = usage.blocks.iter().filter(|block| block.cidr.addr().is_ipv6() == v6);
    of.map(|block| block.counts.borrowed).sum()
}

/// What the API server has of an address: the entry in its block.
fn entry(lab: &Lab, ip: IpAddr) -> Option<Value> {
    let list = lab.cluster().unwrap().kubectl(&["get", "ipblocks", "-o", "json"]).unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    list["items"].as_array().unwrap().iter().find_map(|block| {
        let cidr: ipnet::IpNet = block["spec"]["cidr"].as_str()?.parse().ok()?;
        let place = cidr.contains(&ip).then(|| bits(ip) - bits(cidr.network()))?;
        block["spec"]["allocations"].get(place.to_string()).cloned()
    })
}

fn meshctl(lab: &Lab, node: &str, arguments: &[&str]) -> Result<String, String> {
    let argv = [&["meshctl", "ipam"], arguments].concat();
    lab.host(node).unwrap().run(&argv).map_err(|error| format!("{error:#}"))
}

/// Waits until nothing is wrong with any address, as a node sees it.
fn is_sound(lab: &Lab, node: &str) {
    wait::until("meshctl ipam check to find nothing", LONG, || match meshctl(lab, node, &["check"]) {
        Ok(text) if text.contains("Nothing is wrong") => Ok(Some(())),
        Ok(text) | Err(text) => anyhow::bail!(text),
    })
    .unwrap();
}

fn all_differ(ips: impl IntoIterator<Item = IpAddr>) -> BTreeSet<IpAddr> {
    let mut seen = BTreeSet::new();
    for ip in ips {
        assert!(seen.insert(ip), "{ip} was given twice");
    }
    seen
}

fn addresses(lab: &Lab) -> Vec<IpAddr> {
    let own = lab.node_names().into_iter().flat_map(|node| tunnels(lab, &node));
    let pods = lab.pods().flat_map(|pod| pod.ips.clone());
    own.chain(pods).collect()
}

/// A node's own ends of the tunnel.
fn tunnels(lab: &Lab, node: &str) -> Vec<IpAddr> {
    let text =
        lab.host(node).unwrap().run(&["ip", "-o", "addr", "show", "dev", "margay0", "scope", "global"]);
    let text = text.unwrap();
    let words = text.lines().filter_map(|line| line.split_whitespace().nth(3));
    words.map(|word| word.split('/').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn nodes_share_pools_and_no_address_is_given_twice() {
    let mut lab = Lab::plug(lab(), &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    lab.address().unwrap();
    lab.write_cluster().unwrap();
    lab.put(pool("four", json!({"cidr": V4, "blockSize": 29}))).unwrap();
    lab.put(pool("six", json!({"cidr": V6, "blockSize": 125}))).unwrap();
    for node in ["a", "b", "c"] {
        lab.start_node(node).unwrap();
    }
    lab.settle(LONG).unwrap();
    wait::until("each node to have its ends of the tunnel", LONG, || {
        let names = lab.node_names();
        Ok(names.iter().all(|node| tunnels(&lab, node).len() == 2).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs("a")));
    add(&mut lab, &[("pa", "a"), ("pb", "b"), ("pc", "c")]);
    reach(&lab, &[("pa", "pb"), ("pb", "pc"), ("pc", "pa")]);
    let net: [ipnet::IpNet; 2] = [V4.parse().unwrap(), V6.parse().unwrap()];
    assert!(addresses(&lab).iter().all(|ip| net.iter().any(|net| net.contains(ip))));
    let home = &blocks(&usage(&lab, "a"), "b", false)[0].cidr.to_string();
    let allowed = lab.host("a").unwrap().run(&["wg", "show", "margay0", "allowed-ips"]).unwrap();
    assert!(allowed.contains(home.as_str()), "{home} is not in {allowed}");

    // A second block, and then addresses of others' blocks.
    let names: Vec<String> = (0..24).map(|n| format!("x{n}")).collect();
    let first: Vec<(&str, &str)> = names[..12].iter().map(|name| (name.as_str(), "a")).collect();
    add(&mut lab, &first);
    let mut last = 12;
    while [false, true].iter().any(|v6| borrowed(&usage(&lab, "a"), *v6) == 0) {
        add(&mut lab, &[(names[last].as_str(), "a")]);
        last += 1;
    }
    for v6 in [false, true] {
        assert_eq!(blocks(&usage(&lab, "a"), "a", v6).len(), 2, "{:?}", usage(&lab, "a"));
    }
    let guest = names[last - 1].as_str();
    reach(&lab, &[(guest, "pb"), (guest, "pc"), (guest, "pa"), ("x0", "pb"), ("x11", "pc")]);
    all_differ(addresses(&lab));
    has_issue(&lab, "a", "IpamPoolsExhausted", "IPPool/four");
    is_sound(&lab, "a");

    // What is in use is not freed for anybody, on whichever node it is asked.
    let given = address(lab.pod("d", guest).unwrap(), false).to_string();
    for node in ["a", "b"] {
        let refused = meshctl(&lab, node, &["release", &given]).unwrap_err();
        assert!(refused.contains(&format!("{given} is not freed: pod d/{guest} has it")), "{refused}");
    }
    let tunnel = tunnels(&lab, "b")[0].to_string();
    let refused = meshctl(&lab, "a", &["release", &tunnel]).unwrap_err();
    assert!(refused.contains("node b's, which is in the cluster"), "{refused}");
    let free = meshctl(&lab, "a", &["release", "10.50.1.9"]).unwrap();
    assert!(free.contains("in no block"), "{free}");
    let table = meshctl(&lab, "a", &["show", "--blocks"]).unwrap();
    assert!(table.contains("four") && table.contains(home.as_str()), "{table}");

    // Pods go: the second block is given back in time, and the borrowed address first.
    for name in names[1..last].iter().rev() {
        lab.remove_pod("d", name).unwrap();
    }
    wait::until("what was borrowed to be given back", LONG, || {
        let usage = usage(&lab, "a");
        let left = |v6| borrowed(&usage, v6) == 0 && blocks(&usage, "a", v6).len() == 1;
        anyhow::ensure!(left(false) && left(true), "{usage:?}");
        Ok(Some(()))
    })
    .unwrap();
    has_no_issue(&lab, "a");

    // Without its API server a node gives what it holds, also after its agent was killed, and nothing twice.
    lab.cluster().unwrap().stop().unwrap();
    let bins = bins();
    let mut before = addresses(&lab);
    for name in ["y0", "y1"] {
        let began = Instant::now();
        let made = pods::add(lab.host("b").unwrap(), &bins, &pod(name, "b"));
        let made = made.unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs("b")));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        before.extend(made.ips);
    }
    all_differ(before.clone());
    lab.cluster().unwrap().resume().unwrap();
    lab.host("b").unwrap().kill_unit("mesh-agent").unwrap();
    lab.settle(LONG).unwrap();
    let made = wait::until("an ADD of the new agent", LONG, || {
        pods::add(lab.host("b").unwrap(), &bins, &pod("y2", "b")).map(Some)
    });
    before.extend(made.unwrap().ips);
    all_differ(before);
    reach(&lab, &[("pa", "pb"), ("pb", "pc")]);

    // A pod that goes while the agent is down.
    let host = lab.host("b").unwrap();
    host.stop_unit("mesh-agent").unwrap();
    let links = || host.run(&["ip", "-o", "link"]).unwrap().matches("mgy").count();
    let there = links();
    host.run(&["ip", "netns", "del", "d_y0"]).unwrap();
    wait::until("its interface to be gone", PATIENCE, || Ok((links() < there).then_some(()))).unwrap();
    lab.start_agent("b").unwrap();
    wait::until("its address to be given back", LONG, || {
        let list = lab.cluster()?.kubectl(&["get", "ipblocks", "-o", "json"])?;
        Ok((!list.contains("\"y0\"") && list.contains("\"y1\"")).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs("b")));
    for name in ["y1", "y2"] {
        pods::del(host, &bins, &pod(name, "b")).unwrap();
    }
    lab.settle(LONG).unwrap();
    is_sound(&lab, "b");

    // A pool that cannot be is one issue, and changes nothing else.
    for (name, spec, reason) in [
        ("twin", json!({"cidr": "10.50.0.0/28"}), "PoolOverlap"),
        ("small", json!({"cidr": "10.60.0.0/28", "blockSize": 26}), "InvalidField"),
    ] {
        let bad = pool(name, spec);
        lab.put(bad.clone()).unwrap();
        let object = format!("IPPool/{name}");
        has_issue(&lab, "a", reason, &object);
        let issues = lab.agent("a").unwrap().status().unwrap().issues;
        assert_eq!(issues.iter().filter(|issue| issue.object == object).count(), 1, "{issues:?}");
        lab.delete(&bad).unwrap();
        has_no_issue(&lab, "a");
    }

    // A node leaves: what it kept is freed in time, and never what a pod has.
    let mesh = json!({"spec": {"ipam": {"reclaimAfter": "20s"}}});
    lab.cluster().unwrap().patch("meshconfiguration", None, "default", &mesh).unwrap();
    let kept = [address(lab.pod("d", "pc").unwrap(), false), address(lab.pod("d", "pc").unwrap(), true)];
    let idle = tunnels(&lab, "c");
    lab.host("c").unwrap().stop_unit("mesh-agent").unwrap();
    let gone = lab.spec().nodes.iter().find(|node| node.name == "c").unwrap().clone();
    lab.cluster().unwrap().client().delete(&manifests::node(&gone)).unwrap();
    wait::until("its own addresses to be free", LONG, || {
        let left: Vec<_> = idle.iter().filter_map(|ip| entry(&lab, *ip)).collect();
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}\n{}", lab.logs("a"), lab.logs("b")));
    for ip in kept {
        let entry = entry(&lab, ip).unwrap_or_else(|| panic!("{ip} was taken from pod pc"));
        assert_eq!((&entry["node"], &entry["handle"]["name"]), (&json!("c"), &json!("pc")));
        let refused = meshctl(&lab, "a", &["release", &ip.to_string()]).unwrap_err();
        assert!(refused.contains("pod d/pc has it"), "{refused}");
    }
    lab.cluster().unwrap().client().delete(&manifests::pod(&pod("pc", "c"), &PodStatus::default())).unwrap();
    // An operator need not wait.
    let released = wait::until("the release", LONG, || {
        meshctl(&lab, "a", &["release", &kept[0].to_string()]).map(Some).map_err(anyhow::Error::msg)
    });
    assert!(released.unwrap().contains("free"));
    wait::until("its blocks to be gone", LONG, || {
        let usage = usage(&lab, "a");
        let left = usage.blocks.iter().filter(|block| block.node.as_deref().is_none_or(|node| node == "c"));
        let left: Vec<_> = left.collect();
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}\n{}", lab.logs("a"), lab.logs("b")));
    is_sound(&lab, "a");
    reach(&lab, &[("pa", "pb"), ("x0", "pb")]);
    nothing_in_clear(capture);
}
