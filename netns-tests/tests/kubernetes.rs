//! The mesh of a cluster: real agents whose only source is the real API server, under the rights and the admission
//! policies that are shipped, while nodes join, leave and are rebuilt, hands edit what is not theirs, and the API server
//! is away.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::time::Duration;

use common::{
    CANARY, LONG, SERVER, address, all_between, assert_cut, assert_reach, between, bins, has_issue,
    has_no_issue, nodes, nothing_in_clear, reach,
};
use netns_tests::capture::Capture;
use netns_tests::cluster::Cluster;
use netns_tests::flow::Flow;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::manifests;
use netns_tests::spec::Protocol;
use netns_tests::wait;
use serde_json::{Value, json};

fn node(cluster: &Cluster<'_>, name: &str) -> Value {
    cluster.get("node", None, name).unwrap()
}

fn annotation(node: &Value, key: &str) -> String {
    node["metadata"]["annotations"][key].as_str().unwrap_or_default().to_owned()
}

fn condition(node: &Value) -> Value {
    let all = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|one| one["type"] == "MargayMeshReady").unwrap_or_default()
}

fn is_ready(cluster: &Cluster<'_>, name: &str) {
    wait::until(format!("node {name} to be ready"), LONG, || {
        let now = condition(&node(cluster, name));
        anyhow::ensure!(now["status"] == "True" && now["reason"] == "MeshReady", "{now}");
        Ok(Some(()))
    })
    .unwrap();
}

fn flow(lab: &Lab, from: &str, to: &str, v6: bool) -> Flow {
    let (near, far) = (lab.pod("d", from).unwrap(), lab.pod("d", to).unwrap());
    let ends = ((&near.netns, address(near, v6)), (&far.netns, address(far, v6)));
    Flow::start(ends.0, ends.1, Duration::from_millis(5)).unwrap()
}

/// Flows both ways between the pods of a and b, in both families.
fn flows(lab: &Lab) -> Vec<Flow> {
    reach(lab, &[("pa", "pb")]);
    [("pa", "pb", false), ("pb", "pa", true)].map(|(from, to, v6)| flow(lab, from, to, v6)).into()
}

fn nothing_lost(flows: Vec<Flow>) {
    for flow in flows {
        let count = flow.stop();
        println!("{count:?}");
        assert!(count.sent > 0 && count.lost() == 0, "{count:?}");
    }
}

/// A lab of nodes for these letters that is up, its wire watched.
fn up(letters: &str) -> (Lab, Capture) {
    let mut lab = Lab::plug(nodes(letters, SERVER), &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    lab.settle(PATIENCE).unwrap();
    lab.start_pods().unwrap();
    (lab, capture)
}

/// Requests for nodes that change something, as the API server counts them.
fn writes(cluster: &Cluster<'_>) -> u64 {
    let text = cluster.kubectl(&["get", "--raw=/metrics"]).unwrap();
    let of_nodes = text.lines().filter(|line| {
        line.starts_with("apiserver_request_total{")
            && (line.contains("resource=\"nodes\"") || line.contains("resource=\"meshnodestatuses\""))
            && ["APPLY", "PATCH", "PUT", "POST"].iter().any(|verb| line.contains(&format!("verb=\"{verb}\"")))
    });
    of_nodes.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map(|n| n as u64).sum()
}

#[test]
fn what_a_node_says_is_in_its_object_and_only_it_says_so() {
    let (mut lab, capture) = up("ab");
    reach(&lab, &[("pa", "pb")]);
    let cluster = lab.cluster().unwrap();

    // Announced, told, and readable.
    for name in ["a", "b"] {
        is_ready(&cluster, name);
        let object = node(&cluster, name);
        let key = lab.host(name).unwrap().run(&["wg", "show", "margay0", "public-key"]).unwrap();
        assert!(annotation(&object, "margay.io/keys").contains(key.trim()), "{object}");
        // kubectl leaves them out.
        let whole = cluster.client().ask("GET", &format!("/api/v1/nodes/{name}"), None).unwrap();
        let fields = whole["metadata"]["managedFields"].as_array().unwrap().clone();
        let managers: Vec<&str> = fields.iter().filter_map(|entry| entry["manager"].as_str()).collect();
        assert!(
            managers.contains(&"margay-agent") && managers.contains(&"margay-agent-status"),
            "{managers:?}"
        );
        wait::until("its MeshNodeStatus", LONG, || {
            let table = cluster.kubectl(&["get", "meshnodestatus", name, "--no-headers"])?;
            let words: Vec<&str> = table.split_whitespace().collect();
            anyhow::ensure!(words.get(..6) == Some(&[name, "True", "1", "0", "1", "0"]), "{table}");
            Ok(Some(()))
        })
        .unwrap();
        let own = cluster.get("meshnodestatus", None, name).unwrap();
        assert_eq!(own["metadata"]["ownerReferences"][0]["uid"], object["metadata"]["uid"]);
    }
    let told = cluster.kubectl(&["describe", "node", "a"]).unwrap();
    assert!(told.contains("margay.io/keys") && told.contains("MargayMeshReady"), "{told}");

    // Nothing changes, so nothing is written.
    let before = writes(&cluster);
    std::thread::sleep(Duration::from_secs(10)); // What is measured is that nothing happens.
    assert_eq!(writes(&cluster), before);

    // The operator's word is obeyed. (While packets come, they say where the peer is.)
    let word = "margay.io/endpoint-override=[2001:db8::2]:51820";
    cluster.kubectl(&["annotate", "node", "b", word]).unwrap();
    wait::until("the operator's word to be obeyed", LONG, || {
        let endpoints = lab.host("a")?.run(&["wg", "show", "margay0", "endpoints"])?;
        Ok(endpoints.contains("[2001:db8::2]:51820").then_some(()))
    })
    .unwrap();
    // A hand in what is the agent's is repaired, and costs no packet, and the operator's word stays.
    let traffic = flows(&lab);
    let right = node(&cluster, "b");
    for bad in ["x", "[{\"publicKey\":\"AAAA\"}]", ""] {
        let edit = format!("margay.io/keys={bad}");
        cluster.kubectl(&["annotate", "--overwrite", "node", "b", &edit]).unwrap();
        wait::until(format!("{edit} to be repaired"), LONG, || {
            let now = annotation(&node(&cluster, "b"), "margay.io/keys");
            anyhow::ensure!(now == annotation(&right, "margay.io/keys"), "{now}");
            Ok(Some(()))
        })
        .unwrap();
    }
    cluster
        .kubectl(&["annotate", "node", "b", "margay.io/keys-", "margay.io/announcement-version-"])
        .unwrap();
    wait::until("removed annotations to be back", LONG, || {
        let now = node(&cluster, "b");
        let same = ["margay.io/keys", "margay.io/announcement-version"]
            .iter()
            .all(|key| annotation(&now, key) == annotation(&right, key));
        Ok(same.then_some(()))
    })
    .unwrap();
    cluster
        .kubectl(&["annotate", "--overwrite", "node", "b", "margay.io/endpoint-override=nowhere"])
        .unwrap();
    has_issue(&lab, "a", "InvalidEndpoint", "Node/b");
    cluster.kubectl(&["annotate", "node", "b", "margay.io/endpoint-override-"]).unwrap();
    for name in ["a", "b"] {
        has_no_issue(&lab, name);
    }
    nothing_lost(traffic);

    // Policies are the API server's too.
    let deny = manifests::policy("d", "deny", json!({"podSelector": {"matchLabels": {"app": "b"}}}));
    lab.put(deny.clone()).unwrap();
    lab.enforced().unwrap();
    assert_cut(&[
        between(&lab, "pa", "pb", false, Protocol::Tcp),
        between(&lab, "pa", "pb", true, Protocol::Udp),
    ]);
    assert_reach(&[between(&lab, "pb", "pa", false, Protocol::Tcp)]);
    lab.delete(&deny).unwrap();
    lab.enforced().unwrap();
    assert_reach(&all_between(&lab, "pa", "pb"));
    nothing_in_clear(capture);
}

#[test]
fn the_mesh_goes_on_without_its_api_server() {
    let (lab, capture) = up("ab");
    let cluster = lab.cluster().unwrap();
    let traffic = flows(&lab);

    // Away: told, and nothing else happens, not even to an agent that starts meanwhile.
    cluster.stop().unwrap();
    has_issue(&lab, "a", "Unreachable", "API server");
    let host = lab.host("a").unwrap();
    host.kill_unit("mesh-agent").unwrap();
    wait::until("a new agent to wait for its source", PATIENCE, || {
        let now = lab.agent("a")?.status()?;
        let waits = now.sources.iter().any(|source| source.name == "kubernetes" && !source.synced);
        Ok((waits && now.issues.iter().any(|issue| issue.reason == "Unreachable")).then_some(()))
    })
    .unwrap();
    assert!(host.run(&["curl", "-sS", "http://127.0.0.1:9475/readyz"]).unwrap().contains("kubernetes"));

    // Back, with the past forgotten (410) and a change that nobody heard of.
    cluster.resume().unwrap();
    let deny = manifests::policy("d", "deny", json!({"podSelector": {"matchLabels": {"app": "none"}}}));
    cluster.apply(&deny.to_string()).unwrap();
    cluster.restart_compacted().unwrap();
    for name in ["a", "b"] {
        has_no_issue(&lab, name);
        lab.settle_node(name, LONG).unwrap();
        let heard = wait::until(format!("{name} to hear of the policy"), LONG, || {
            let table = lab.host(name)?.run(&["meshctl", "policy", "list"])?;
            Ok(table.contains("deny").then_some(()))
        });
        heard.unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs(name)));
    }

    // Its rights are taken away while it runs: told by name of what is forbidden, and what was heard stays.
    let binding = "clusterrolebinding/margay-mesh-agent";
    let saved = cluster.kubectl(&["get", binding, "-o", "json"]).unwrap();
    cluster.kubectl(&["delete", binding]).unwrap();
    host.kill_unit("mesh-agent").unwrap();
    has_issue(&lab, "a", "Forbidden", "API server");
    let mut saved: Value = serde_json::from_str(&saved).unwrap();
    saved["metadata"] = json!({"name": "margay-mesh-agent"});
    cluster.apply(&saved.to_string()).unwrap();
    has_no_issue(&lab, "a");
    lab.settle(LONG).unwrap();
    nothing_lost(traffic);
    nothing_in_clear(capture);
}

#[test]
fn nodes_join_leave_move_and_are_rebuilt() {
    let mut lab = Lab::plug(nodes("abc", SERVER), &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    lab.address().unwrap();
    lab.write_cluster().unwrap();
    let spec = lab.spec().nodes.iter().find(|node| node.name == "c").unwrap().clone();
    lab.delete(&manifests::node(&spec)).unwrap();
    for name in ["a", "b"] {
        lab.start_node(name).unwrap();
    }
    let has_peers = |lab: &Lab, node: &str, wanted: &[&str]| {
        wait::until(format!("{node} to have the peers {wanted:?}"), LONG, || {
            let now = lab.agent(node)?.status()?;
            let peers: Vec<String> = now.peers.iter().map(|peer| peer.name.clone()).collect();
            let done = now.generation.enforced >= now.generation.snapshot && now.generation.policy > 0;
            anyhow::ensure!(peers == wanted && done, "{peers:?} {:?} {:?}", now.generation, now.issues);
            Ok(Some(()))
        })
        .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs(node)));
    };
    has_peers(&lab, "a", &["b"]);
    has_peers(&lab, "b", &["a"]);

    // An agent may be there before its Node, and cannot make one.
    lab.start_node("c").unwrap();
    has_issue(&lab, "c", "NodeMissing", "Node/c");
    assert!(lab.cluster().unwrap().get("node", None, "c").is_err());
    lab.put(manifests::node(&spec)).unwrap();
    lab.settle(LONG).unwrap();
    lab.start_pods().unwrap();
    reach(&lab, &[("pa", "pb"), ("pb", "pc"), ("pc", "pa")]);
    let traffic = flows(&lab);

    // It leaves: nobody reaches its pods any more, by no way.
    lab.delete(&manifests::node(&spec)).unwrap();
    has_peers(&lab, "a", &["b"]);
    has_peers(&lab, "b", &["a"]);
    assert_cut(&[
        between(&lab, "pa", "pc", false, Protocol::Tcp),
        between(&lab, "pb", "pc", true, Protocol::Udp),
    ]);

    // It comes back as another one of that name: a new object, a new disk, a new key.
    let pod = lab.spec().pods.iter().find(|pod| pod.name == "pc").unwrap().clone();
    lab.remove_pod("d", "pc").unwrap();
    let cluster = lab.cluster().unwrap();
    let key = |lab: &Lab| lab.host("c").unwrap().run(&["wg", "show", "margay0", "public-key"]).unwrap();
    let old = key(&lab);
    lab.host("c").unwrap().stop_unit("mesh-agent").unwrap();
    lab.host("c").unwrap().run(&["mesh-agent", "cleanup", "--purge"]).unwrap();
    // What the old one said still stands in the new one's object, as a backup might have it.
    let mut stale = manifests::node(&spec);
    stale["metadata"]["annotations"] = json!({
        "margay.io/announcement-version": "1",
        "margay.io/keys": json!([{"publicKey": old.trim(), "port": 51820, "epoch": 0}]).to_string(),
        "margay.io/endpoints": "192.0.2.3:51820", "margay.io/capabilities": "", "margay.io/pod-cidrs": "",
    });
    cluster.client().apply(&stale).unwrap();
    lab.put(manifests::node(&spec)).unwrap();
    lab.write_node("c").unwrap();
    lab.start_agent("c").unwrap();
    lab.settle(LONG).unwrap();
    assert_ne!(key(&lab), old);
    lab.add_pods(&[(pod, manifests::PodStatus::default())]).unwrap();
    reach(&lab, &[("pa", "pc"), ("pc", "pb")]);

    // Another cluster's node with the same key and address steals nothing.
    let keys = annotation(&node(&lab.cluster().unwrap(), "b"), "margay.io/keys");
    let thief = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "thief", "annotations": {
            "margay.io/announcement-version": "1", "margay.io/keys": keys,
            "margay.io/endpoints": "192.0.2.2:51820", "margay.io/pod-cidrs": "10.244.2.0/24",
            "margay.io/capabilities": "",
        }},
        "spec": {"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]},
    });
    lab.cluster().unwrap().client().apply(&thief).unwrap();
    has_issue(&lab, "a", "DuplicateKey", "Node/thief");
    lab.cluster().unwrap().client().delete(&thief).unwrap();
    for name in ["a", "b", "c"] {
        has_no_issue(&lab, name);
    }

    // Its address changes, on the wire and in its object.
    let host = lab.host("c").unwrap();
    host.netns().ip(&["addr add 192.0.2.33/24 dev eth0".into()]).unwrap();
    let other_way: Vec<String> = ["a", "b"].map(String::from).into();
    for name in &other_way {
        lab.host(name).unwrap().netns().ip(&["route replace 192.0.2.33/32 dev eth0".into()]).unwrap();
    }
    let addresses = json!([
        {"type": "InternalIP", "address": "192.0.2.33"}, {"type": "InternalIP", "address": "2001:db8::3"},
    ]);
    lab.cluster().unwrap().set_status("node", None, "c", &json!({"addresses": addresses})).unwrap();
    wait::until("a to know the new address", LONG, || {
        let allowed = lab.host("a")?.run(&["wg", "show", "margay0", "allowed-ips"])?;
        Ok((allowed.contains("192.0.2.33/32") && !allowed.contains("192.0.2.3/32")).then_some(()))
    })
    .unwrap();
    reach(&lab, &[("pa", "pc"), ("pc", "pb")]);
    nothing_lost(traffic);
    nothing_in_clear(capture);
}

/// A pod as another network plugin makes it: a veth, a host route, and nothing of ours.
fn foreign_pod(lab: &Lab, node: &str, ip: &str) {
    let script = format!(
        "ip netns add pod && ip link add veth9 type veth peer name eth0 netns pod && ip link set veth9 up \
         && ip -n pod link set lo up && ip -n pod link set eth0 up && ip -n pod addr add {ip}/32 dev eth0 \
         && ip -n pod route add 169.254.1.1 dev eth0 && ip -n pod route add default via 169.254.1.1 \
         && sysctl -qw net.ipv4.conf.veth9.proxy_arp=1 net.ipv4.ip_forward=1 && ip route add {ip} dev veth9"
    );
    lab.host(node).unwrap().run(&["sh", "-c", &script]).unwrap();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "d", "name": format!("x{node}")},
        "spec": {"nodeName": node, "containers": [{"name": "main", "image": "lab"}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    });
    lab.cluster().unwrap().client().apply(&pod).unwrap();
}

/// Whether a ping from the foreign pod of a node is answered; its payload is the canary.
fn pings(lab: &Lab, node: &str, to: &str) -> bool {
    let pattern: String = CANARY.iter().map(|byte| format!("{byte:02x}")).collect();
    let ping = ["ping", "-n", "-q", "-c", "1", "-W", "1", "-s", "100", "-p", &pattern, to];
    lab.host(node).unwrap().pod_command("pod", &ping).output().unwrap().status.success()
}

#[test]
fn another_plugins_pods_are_encrypted_and_left_alone() {
    let more = format!("{SERVER}mesh: {{podNetwork: external, pools: [{{cidr: 10.99.0.0/16}}]}}\n");
    let mut spec = nodes("ab", &more);
    spec.pods.clear();
    let mut lab = Lab::plug(spec, &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY]).unwrap();
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    lab.settle(PATIENCE).unwrap();
    let d = netns_tests::spec::Namespace { name: "d".into(), ..Default::default() };
    lab.put(manifests::namespace(&d)).unwrap();
    foreign_pod(&lab, "a", "10.99.0.5");
    foreign_pod(&lab, "b", "10.99.200.6");
    let look = |node: &str| {
        let host = lab.host(node).unwrap();
        let link = host.run(&["ip", "-d", "link", "show", "veth9"]).unwrap();
        let hooks = host.run(&["tc", "qdisc", "show", "dev", "veth9"]).unwrap();
        let routes = host.run(&["ip", "route", "show", "table", "main"]).unwrap();
        (link, hooks, routes, host.run(&["nft", "list", "ruleset"]).unwrap())
    };
    let before = look("a");
    wait::until("the pods to reach each other", LONG, || {
        Ok((pings(&lab, "a", "10.99.200.6") && pings(&lab, "b", "10.99.0.5")).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs("a")));
    assert_eq!(look("a"), before);
    let allowed = lab.host("a").unwrap().run(&["wg", "show", "margay0", "allowed-ips"]).unwrap();
    assert!(allowed.contains("10.99.200.6/32") && !allowed.contains("10.244."), "{allowed}");
    // A host and a pod elsewhere, and an address of the range that no pod has: it goes nowhere, and not in clear.
    let from_host = ["ping", "-n", "-q", "-c", "1", "-W", "2", "10.99.200.6"];
    lab.host("a").unwrap().run(&from_host).unwrap();
    assert!(!pings(&lab, "a", "10.99.77.7"));
    // No plugin of ours attaches a pod there.
    let pod = netns_tests::spec::Pod { namespace: "d".into(), name: "y".into(), ..Default::default() };
    let host = lab.host("a").unwrap();
    host.run(&["ip", "netns", "add", "d_y"]).unwrap();
    let refused = netns_tests::pods::cni(host, lab.bins(), "ADD", &pod).unwrap_err().to_string();
    assert!(refused.contains("podNetwork is external"), "{refused}");

    // Without ranges strictness cannot be had: refused by name, and what was in force stays.
    let mesh = json!({"spec": {"pools": null}});
    lab.cluster().unwrap().patch("meshconfiguration", None, "default", &mesh).unwrap();
    has_issue(&lab, "a", "InvalidField", "MeshConfiguration/default");
    assert!(pings(&lab, "a", "10.99.200.6"));
    let event = ["get", "events.events.k8s.io", "-A", "-o", "wide"];
    wait::until("an event of it", LONG, || {
        let events = lab.cluster()?.kubectl(&event)?;
        anyhow::ensure!(events.contains("strictEncryption") && events.contains("default"), "{events}");
        Ok(Some(()))
    })
    .unwrap();
    nothing_in_clear(capture);
}

#[test]
fn without_admission_policies_the_first_signer_of_a_node_is_believed() {
    let more = format!("mesh: {{announcementTrust: first-use}}\n{SERVER}");
    let mut lab = Lab::plug(nodes("ab", &more), &bins()).unwrap();
    lab.address().unwrap();
    lab.write_cluster().unwrap();
    let cluster = lab.cluster().unwrap();
    cluster.kubectl(&["delete", "validatingadmissionpolicybindings", "--all"]).unwrap();
    for name in ["a", "b"] {
        lab.start_node(name).unwrap();
    }
    lab.settle(LONG).unwrap();
    lab.start_pods().unwrap();
    let cluster = lab.cluster().unwrap();
    let traffic = flows(&lab);
    assert!(lab.host("a").unwrap().run(&["meshctl", "status"]).unwrap().contains("trust-on-first-use"));
    assert_eq!(lab.agent("a").unwrap().status().unwrap().announcement_trust, "trust-on-first-use");

    // A hand changes what b says: what it said before stays in force until it says it again.
    let endpoints = annotation(&node(&cluster, "b"), "margay.io/endpoints");
    let edit = "margay.io/endpoints=192.0.2.77:51820";
    cluster.kubectl(&["annotate", "--overwrite", "node", "b", edit]).unwrap();
    wait::until("b to repair its announcement", LONG, || {
        Ok((annotation(&node(&cluster, "b"), "margay.io/endpoints") == endpoints).then_some(()))
    })
    .unwrap();

    // Somebody has another node say what b says.
    let mut thief = node(&cluster, "b");
    thief["metadata"] = json!({"name": "z", "annotations": thief["metadata"]["annotations"]});
    thief["spec"] = json!({});
    cluster.client().apply(&thief).unwrap();
    has_issue(&lab, "a", "UnsignedAnnouncement", "Node/z");
    cluster.client().delete(&thief).unwrap();
    has_no_issue(&lab, "a");

    // b comes back with another key to sign with: that waits for somebody who knows.
    let before = annotation(&node(&cluster, "b"), "margay.io/announcement-signature");
    let b = lab.host("b").unwrap();
    b.stop_unit("mesh-agent").unwrap();
    b.remove("/var/lib/margay/announcement-key").unwrap();
    lab.start_agent("b").unwrap();
    has_issue(&lab, "a", "AnnouncementKeyChanged", "Node/b");
    assert_ne!(annotation(&node(&cluster, "b"), "margay.io/announcement-signature"), before);
    reach(&lab, &[("pa", "pb")]);
    // After a restart nothing is left to stay in force; the device goes on by itself meanwhile.
    let a = lab.host("a").unwrap();
    let said = a.run(&["meshctl", "nodes", "trust", "b"]).unwrap();
    assert!(said.contains("node b"), "{said}");
    has_no_issue(&lab, "a");
    lab.settle_node("a", LONG).unwrap();
    a.kill_unit("mesh-agent").unwrap();
    lab.settle_node("a", LONG).unwrap();
    has_no_issue(&lab, "a");
    assert!(a.run(&["meshctl", "nodes", "trust", "nobody"]).is_err());
    nothing_lost(traffic);
}
