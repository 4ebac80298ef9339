//! What one node's token can do to addresses: take what is free, and nothing that is another's.

use netns_tests::http::Answer;
use netns_tests::wait;
use serde_json::{Value, json};

use crate::support::{Caller, NAMESPACE, PATIENCE, allowed, install, refused, with_cluster};

const BLOCKS: &str = "/apis/margay.io/v1alpha1/ipblocks";
/// Two policies refuse it, and either may say so.
const BOTH: &str = "ValidatingAdmissionPolicy 'margay-agent-o";
const NAME: &str = "10-50-0-0-29";

fn entry(node: &str) -> Value {
    json!({"node": node, "instance": format!("{node}-1")})
}

fn block(name: &str, affinity: Option<&str>, allocations: Value) -> Value {
    let cidr = name.rsplit_once('-').map(|(ip, len)| format!("{}/{len}", ip.replace('-', "."))).unwrap();
    let mut spec = json!({"cidr": cidr, "renewals": 0, "allocations": allocations});
    if let Some(node) = affinity {
        spec["affinity"] = json!(node);
    }
    json!({"apiVersion": "margay.io/v1alpha1", "kind": "IPBlock", "metadata": {"name": name}, "spec": spec})
}

fn create(caller: &Caller, block: &Value) -> Answer {
    caller.ask("POST", BLOCKS, "application/json", block)
}

/// Replaces what is there, of the version that it has now.
fn replace(caller: &Caller, mut block: Value) -> Answer {
    let path = format!("{BLOCKS}/{}", block["metadata"]["name"].as_str().unwrap());
    let now = caller.ask("GET", &path, "", &Value::Null).good().unwrap();
    let now: Value = serde_json::from_slice(&now).unwrap();
    block["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"].clone();
    caller.ask("PUT", &path, "application/json", &block)
}

fn delete(caller: &Caller, name: &str) -> Answer {
    caller.ask("DELETE", &format!("{BLOCKS}/{name}"), "", &Value::Null)
}

#[test]
fn a_token_takes_free_addresses_and_none_of_a_node_that_is_there() {
    with_cluster(|cluster| {
        install(cluster, &["a", "b"]);
        let agent =
            |name: &str, pod: Option<&str>| Caller::account(cluster, name, (NAMESPACE, "mesh-agent"), pod);
        let (a, b) = (agent("agent-a", Some("mesh-agent-a")), agent("agent-b", Some("mesh-agent-b")));
        let unbound = agent("unbound", None);
        // By the administrator, whom no policy of ours judges: what a node left that is gone.
        let left = block("10-50-0-8-29", Some("gone"), json!({"0": entry("gone"), "1": entry("b")}));
        cluster.apply(&left.to_string()).unwrap();
        // Rights and policies take a moment to count.
        wait::until("the policies to count", PATIENCE, || {
            let probe = block("10-50-0-16-29", Some("b"), json!({}));
            let made = create(&a, &probe);
            if made.status == 201 {
                cluster.kubectl(&["delete", "ipblock", "10-50-0-16-29"])?;
            }
            Ok(String::from_utf8_lossy(&made.body).contains("makes a block its own").then_some(()))
        })
        .unwrap();
        wait::until("the other policy to count", PATIENCE, || {
            let probe = block("10-50-0-24-29", Some("a"), json!({"0": entry("b")}));
            cluster.apply(&probe.to_string())?;
            Ok((delete(&a, "10-50-0-24-29").status == 403).then_some(()))
        })
        .unwrap();
        cluster.kubectl(&["delete", "ipblock", "10-50-0-24-29"]).unwrap();

        // What the allocator does.
        refused("unbound", "bound to no node", create(&unbound, &block(NAME, None, json!({}))));
        let other = block(NAME, Some("b"), json!({}));
        refused("a block of another", "only if it is nobody's", create(&a, &other));
        let other = block(NAME, Some("a"), json!({"0": entry("b")}));
        refused("another's address", "of its own node only", create(&a, &other));
        allowed("a block", create(&a, &block(NAME, Some("a"), json!({"0": entry("a")}))));
        let full = |of_b: Value| {
            let mut all = json!({"0": entry("a"), "3": of_b});
            all.as_object_mut().unwrap().retain(|_, entry| !entry.is_null());
            block(NAME, Some("a"), all)
        };
        allowed("borrowing", replace(&b, full(entry("b"))));
        let mut known = entry("b");
        known["handle"] = json!({"kind": "pod", "namespace": "d", "name": "x"});
        allowed("whose it is", replace(&b, full(known.clone())));

        // What it never does.
        for (what, word, spec) in [
            (
                "taking over",
                "of its own node only",
                block(NAME, Some("a"), json!({"0": entry("b"), "3": known})),
            ),
            (
                "freeing another's",
                "node a's, which is in the cluster",
                block(NAME, Some("a"), json!({"3": known})),
            ),
            ("taking the block", BOTH, block(NAME, Some("b"), json!({"0": entry("a"), "3": known}))),
            (
                "letting go",
                "node a's, which is in the cluster",
                block(NAME, None, json!({"0": entry("a"), "3": known})),
            ),
            ("giving away", BOTH, block(NAME, Some("c"), json!({"0": entry("a"), "3": known}))),
            (
                "another's word",
                "of its own node only",
                block(NAME, Some("a"), json!({"0": {"node": "a", "instance": "a-2"}, "3": known})),
            ),
            (
                "for another",
                "of its own node only",
                block(NAME, Some("a"), json!({"0": entry("a"), "3": known, "4": entry("a")})),
            ),
        ] {
            refused(what, word, replace(&b, spec));
        }
        let mut wide = full(known.clone());
        wide["spec"]["cidr"] = json!("10.50.0.0/24");
        refused("another prefix", "cidr cannot change", replace(&b, wide));
        refused("deletion", "which is in the cluster", delete(&b, NAME));
        refused("deletion of a block with guests", "which is in the cluster", delete(&a, NAME));
        refused("all deletions", "deletecollection", a.ask("DELETE", BLOCKS, "", &Value::Null));
        for kind in ["IPPool", "IPReservation"] {
            let spec =
                if kind == "IPPool" { json!({"cidr": "10.0.0.0/8"}) } else { json!({"reservedCIDRs": []}) };
            let object = json!({"apiVersion": "margay.io/v1alpha1", "kind": kind, "metadata": {"name": "x"}, "spec": spec});
            let path = format!("/apis/margay.io/v1alpha1/{}s", kind.to_lowercase());
            refused(kind, "cannot create resource", a.ask("POST", &path, "application/json", &object));
        }

        // What is left by a node that is gone: it goes, and what a node has that is there stays.
        refused("b's in it", "node b's", delete(&a, "10-50-0-8-29"));
        allowed("gone", replace(&a, block("10-50-0-8-29", None, json!({"1": entry("b")}))));
        let given = block("10-50-0-8-29", Some("b"), json!({"1": entry("b")}));
        refused("a block for another", "only if it is nobody's", replace(&a, given));
        allowed("nobody's", replace(&b, block("10-50-0-8-29", Some("b"), json!({"1": entry("b")}))));
        allowed("its own", delete(&b, "10-50-0-8-29"));
        allowed("giving back", replace(&b, full(Value::Null)));
        allowed("deletion of its own", delete(&a, NAME));
    });
}
