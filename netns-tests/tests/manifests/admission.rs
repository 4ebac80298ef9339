//! Nobody speaks for another node, by any way there is, and nobody but the agent announces keys.

use netns_tests::cluster::Cluster;
use netns_tests::http::Answer;
use netns_tests::wait;
use serde_json::{Value, json};

use crate::support::{
    AGENT, Caller, NAMESPACE, NODE_EXTRA, PATIENCE, allowed, install, pod, refused, with_cluster,
};

const A: &str = "/api/v1/nodes/a";
const A_STATUS: &str = "/api/v1/nodes/a/status";
const STATUSES: &str = "/apis/margay.io/v1alpha1/meshnodestatuses";

const OWN: [&str; 6] = [
    "margay.io/announcement-version",
    "margay.io/keys",
    "margay.io/endpoints",
    "margay.io/capabilities",
    "margay.io/pod-cidrs",
    "margay.io/announcement-signature",
];

/// What an agent applies: all its annotations, or none to take them back.
fn announcement(node: &str, value: Option<&str>) -> Value {
    let mut object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
    if let Some(value) = value {
        object["metadata"]["annotations"] = OWN.iter().map(|key| (key.to_string(), json!(value))).collect();
    }
    object
}

fn condition(node: &str, status: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "status": {"conditions": [
        {"type": "MargayMeshReady", "status": status, "reason": "r", "message": "m",
         "lastTransitionTime": "2026-01-01T00:00:00Z", "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
    ]}})
}

fn node_status(name: &str) -> Value {
    json!({"apiVersion": "margay.io/v1alpha1", "kind": "MeshNodeStatus", "metadata": {"name": name},
        "spec": {}})
}

fn announce(caller: &Caller, node: &str, value: Option<&str>) -> Answer {
    caller.apply(&format!("/api/v1/nodes/{node}"), "margay-agent", &announcement(node, value))
}

/// The rights of an agent for all it could ever ask, so that it is the policies that refuse.
const WIDE: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: wide}
rules:
  - {apiGroups: ['', margay.io], resources: ['*'], verbs: ['*']}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: wide}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: wide}
subjects:
  - {kind: ServiceAccount, name: mesh-agent, namespace: margay-system}
";

/// Policies and roles take a moment to count; without them everybody below may do everything.
fn wait_for_policies(cluster: &Cluster<'_>, agent: &Caller) {
    wait::until("own-node to count", PATIENCE, || {
        let patch = json!({"metadata": {"labels": {"zone": "z2"}}});
        let answer = agent.merge(&format!("{A}?dryRun=All"), &patch);
        Ok((answer.status == 403).then_some(()))
    })
    .unwrap();
    wait::until("own-objects to count", PATIENCE, || {
        let answer = agent.apply(&format!("{STATUSES}/zz"), "x", &node_status("zz"));
        if answer.status != 403 {
            cluster.kubectl(&["delete", "meshnodestatus", "zz"])?;
        }
        Ok((answer.status == 403).then_some(()))
    })
    .unwrap();
    let other =
        Caller::administrator_as(cluster, "waits", "nobody", &["system:masters-not", "labellers"], None);
    cluster.apply(&LABELLERS.replace("NAME", "waits")).unwrap();
    wait::until("announcements to count", PATIENCE, || {
        let path = format!("{A}?dryRun=All");
        let text = other.merge(&path, &json!({"metadata": {"annotations": {OWN[1]: "x"}}}));
        Ok(String::from_utf8_lossy(&text.body).contains("announce").then_some(()))
    })
    .unwrap();
}

/// May patch nodes, as cloud controllers and labellers may.
const LABELLERS: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: labeller-NAME}
rules:
  - {apiGroups: [''], resources: [nodes, nodes/status], verbs: [create, get, patch, update, delete]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: labeller-NAME}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: labeller-NAME}
subjects:
  - {kind: Group, name: labellers, apiGroup: rbac.authorization.k8s.io}
";

#[test]
fn an_agent_speaks_for_its_own_node_under_the_shipped_rights_and_every_bypass_is_refused() {
    with_cluster(|cluster| {
        install(cluster, &["a", "b"]);
        let agent =
            |name: &str, pod: Option<&str>| Caller::account(cluster, name, (NAMESPACE, "mesh-agent"), pod);
        let a = agent("agent-a", Some("mesh-agent-a"));
        wait_for_rights(&a);
        the_agent_does_its_work(cluster, &a);

        cluster.apply(WIDE).unwrap();
        wait_for_policies(cluster, &a);
        the_agent_does_its_work(cluster, &a);
        nothing_else_of_its_own_node(cluster, &a);

        // Others on it.
        pod(cluster, "unscheduled", None);
        let b = agent("agent-b", Some("mesh-agent-b"));
        let unbound = agent("unbound", None);
        let unscheduled = agent("unscheduled", Some("unscheduled"));
        let plain = Caller::administrator_as(cluster, "as-agent", AGENT, &["system:serviceaccounts"], None);
        let extra = Caller::administrator_as(cluster, "as-agent-b", AGENT, &[], Some("b"));
        for (caller, word) in [
            (&b, "the token is for the agent on b; only the agent on a"),
            (&unbound, "the token is bound to no node; only the agent on a"),
            (&unscheduled, "bound to no node"),
            (&plain, "bound to no node"),
            (&extra, "the token is for the agent on b"),
        ] {
            let what = |what: &str| format!("{}: {what}", caller.name);
            refused(&what("announcement"), word, announce(caller, "a", Some("stolen")));
            refused(&what("withdrawal"), word, announce(caller, "a", None));
            let by_status = caller.apply(A_STATUS, "margay-agent", &announcement("a", Some("stolen")));
            refused(&what("announcement through the status"), word, by_status);
            let patch = json!({"metadata": {"annotations": {OWN[1]: "stolen"}}});
            refused(&what("merge patch"), word, caller.merge(A, &patch));
            refused(&what("merge patch of the status"), word, caller.merge(A_STATUS, &patch));
            let ready = caller.apply(A_STATUS, "margay-agent-status", &condition("a", "False"));
            refused(&what("condition"), word, ready);
            let status = caller.apply(&format!("{STATUSES}/a"), "margay-agent-status", &node_status("a"));
            refused(&what("status object"), word, status);
            let status = json!({"apiVersion": "margay.io/v1alpha1", "kind": "MeshNodeStatus", "metadata": {"name": "a"},
                "status": {"peers": 0}});
            let status = caller.apply(&format!("{STATUSES}/a/status"), "margay-agent-status", &status);
            refused(&what("status of the status object"), word, status);
            refused(
                &what("deletion"),
                word,
                caller.ask("DELETE", &format!("{STATUSES}/a"), "", &Value::Null),
            );
        }
        // For itself, b may.
        allowed("b for itself", announce(&b, "b", Some("b")));

        // Impersonation is a right that the agent has not.
        let lies = Caller::account_as(cluster, "lies", "mesh-agent-a", AGENT, Some("b"));
        refused("an agent that impersonates", "cannot impersonate", announce(&lies, "b", Some("stolen")));

        let after = cluster.get("node", None, "a").unwrap();
        assert_eq!(after["metadata"]["annotations"][OWN[1]], json!("second"), "{after}");
    });
}

/// Until the account's own role counts.
fn wait_for_rights(a: &Caller) {
    wait::until("the agent's role to count", PATIENCE, || {
        let answer = a.ask("GET", "/api/v1/nodes?limit=1", "", &Value::Null);
        Ok((answer.status == 200).then_some(()))
    })
    .unwrap();
}

fn the_agent_does_its_work(cluster: &Cluster<'_>, a: &Caller) {
    let before = cluster.get("node", None, "a").unwrap();
    for value in ["first", "second"] {
        allowed("announcement", announce(a, "a", Some(value)));
        let ready = if value == "first" { "False" } else { "True" };
        allowed("condition", a.apply(A_STATUS, "margay-agent-status", &condition("a", ready)));
    }
    allowed("withdrawal", announce(a, "a", None));
    allowed("announcement again", announce(a, "a", Some("second")));
    let path = format!("{STATUSES}/a");
    allowed("status object", a.apply(&path, "margay-agent-status", &node_status("a")));
    let mut status = node_status("a");
    status["status"] = json!({});
    allowed("its status", a.apply(&format!("{path}/status"), "margay-agent-status", &status));
    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"namespace": "default", "generateName": "e"},
        "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning", "reason": "DuplicateKey", "action": "Admit",
        "reportingController": "margay.io/mesh-agent", "reportingInstance": "a", "note": "n",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "a"},
    });
    let events = "/apis/events.k8s.io/v1/namespaces/default/events";
    allowed("event", a.ask("POST", events, "application/json", &event));

    // Nothing but that has changed.
    let mut after = cluster.get("node", None, "a").unwrap();
    assert_eq!(after["metadata"]["annotations"][OWN[0]], json!("second"));
    assert!(after["status"]["conditions"].as_array().unwrap().iter().any(|c| c["type"] == "MargayMeshReady"));
    let mut before = before;
    for node in [&mut after, &mut before] {
        for key in OWN {
            node["metadata"]["annotations"].as_object_mut().unwrap().remove(key);
        }
        let conditions = node["status"]["conditions"].as_array_mut().unwrap();
        conditions.retain(|condition| condition["type"] != "MargayMeshReady");
        for field in ["managedFields", "resourceVersion"] {
            node["metadata"].as_object_mut().unwrap().remove(field);
        }
    }
    assert_eq!(after, before);
}

fn nothing_else_of_its_own_node(cluster: &Cluster<'_>, a: &Caller) {
    let before = cluster.get("node", None, "a").unwrap();
    let metadata = [
        ("a label", json!({"labels": {"zone": "z2"}}), "label"),
        ("a new label", json!({"labels": {"margay.io/x": "y"}}), "label"),
        ("no label", json!({"labels": {"zone": null}}), "label"),
        ("a finalizer", json!({"finalizers": []}), "finalizer"),
        ("another finalizer", json!({"finalizers": ["example.com/hold", "margay.io/x"]}), "finalizer"),
        ("no owner", json!({"ownerReferences": null}), "owner"),
        (
            "an operator's annotation",
            json!({"annotations": {"margay.io/endpoint-override": "192.0.2.66"}}),
            "no annotation but",
        ),
        ("another of ours", json!({"annotations": {"margay.io/new": "x"}}), "no annotation but"),
        ("somebody's annotation", json!({"annotations": {"example.com/theirs": "y"}}), "no annotation but"),
        (
            "no annotation of somebody",
            json!({"annotations": {"example.com/theirs": null}}),
            "no annotation but",
        ),
        ("no annotations at all", json!({"annotations": null}), "no annotation but"),
        ("its own and a label", json!({"annotations": {OWN[1]: "x"}, "labels": {"zone": "z3"}}), "label"),
    ];
    for (what, metadata, word) in metadata {
        let patch = json!({ "metadata": metadata });
        refused(what, word, a.merge(A, &patch));
        refused(&format!("{what}, through the status"), word, a.merge(A_STATUS, &patch));
    }
    for (what, spec) in [
        ("no taint", json!({"taints": null})),
        ("a taint", json!({"taints": [{"key": "u", "effect": "NoExecute"}]})),
        ("unschedulable", json!({"unschedulable": true})),
        ("a provider", json!({"providerID": "x://y"})),
    ] {
        refused(what, "a Node's spec", a.merge(A, &json!({ "spec": spec })));
    }
    let others = &before["status"]["conditions"];
    let changed = |change: &dyn Fn(&mut Vec<Value>)| {
        let mut conditions = others.as_array().unwrap().clone();
        change(&mut conditions);
        json!({"conditions": conditions})
    };
    for (what, status, word) in [
        ("addresses", json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.66"}]}), "address"),
        ("no addresses", json!({"addresses": null}), "address"),
        ("capacity", json!({"capacity": {"cpu": "99"}}), "capacity"),
        ("allocatable", json!({"allocatable": {"cpu": "99"}}), "capacity"),
        ("daemon endpoints", json!({"daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}), "status"),
        ("volumes", json!({"volumesInUse": ["x"]}), "status"),
        ("another's condition", changed(&|c| c[0]["status"] = json!("False")), "condition"),
        ("one condition less", changed(&|c| drop(c.remove(1))), "condition"),
        (
            "a condition more",
            changed(&|c| c.push(json!({"type": "NetworkUnavailable", "status": "False"}))),
            "condition",
        ),
        ("no conditions", json!({"conditions": null}), "condition"),
    ] {
        refused(what, word, a.merge(A_STATUS, &json!({ "status": status })));
    }
    let pointer = "/metadata/annotations/example.com~1theirs";
    let patch = json!([{"op": "remove", "path": pointer}]);
    let json_patch = a.ask("PATCH", A, "application/json-patch+json", &patch);
    refused("a JSON patch", "no annotation but", json_patch);
    let mut whole = before.clone();
    whole["metadata"]["labels"]["zone"] = json!("z4");
    refused("an update", "label", a.ask("PUT", A, "application/json", &whole));
    let strategic = json!({"status": {"addresses": [{"type": "ExternalIP", "address": "192.0.2.66"}]}});
    let strategic = a.ask("PATCH", A_STATUS, "application/strategic-merge-patch+json", &strategic);
    refused("a strategic merge patch", "address", strategic);

    let made = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "c"}});
    let made_at = a.ask("POST", "/api/v1/nodes", "application/json", &made);
    refused("another Node", "neither makes nor deletes", made_at);
    refused("another Node by apply", "neither makes nor deletes", announce(a, "c", Some("c")));
    refused("its deletion", "neither makes nor deletes", a.ask("DELETE", A, "", &Value::Null));
    refused("all deletions", "neither makes nor deletes", a.ask("DELETE", "/api/v1/nodes", "", &Value::Null));

    let other = a.apply(&format!("{STATUSES}/c"), "x", &node_status("c"));
    refused("a status of no node of its", "only the agent on c", other);
    let posted = a.ask("POST", STATUSES, "application/json", &node_status("d"));
    refused("a status by create", "only the agent on d", posted);
    let mesh = json!({"apiVersion": "margay.io/v1alpha1", "kind": "MeshConfiguration", "metadata": {"name": "default"},
        "spec": {"pools": [{"cidr": "10.0.0.0/8"}]}});
    let mesh = a.ask("POST", "/apis/margay.io/v1alpha1/meshconfigurations", "application/json", &mesh);
    refused("the mesh's configuration", "an agent writes no meshconfigurations", mesh);

    let after = cluster.get("node", None, "a").unwrap();
    assert_eq!(after["metadata"]["resourceVersion"], before["metadata"]["resourceVersion"]);
    assert!(NODE_EXTRA.ends_with("node-name"));
}

#[test]
fn who_is_not_the_agent_announces_nothing_and_is_hindered_in_nothing_else() {
    with_cluster(|cluster| {
        install(cluster, &["a"]);
        cluster.apply(&LABELLERS.replace("NAME", "all")).unwrap();
        let a = Caller::account(cluster, "agent-a", (NAMESPACE, "mesh-agent"), Some("mesh-agent-a"));
        wait_for_rights(&a);
        allowed("announcement", announce(&a, "a", Some("first")));
        cluster.apply(WIDE).unwrap();
        wait_for_policies(cluster, &a);

        let labeller = Caller::administrator_as(cluster, "labeller", "cloud", &["labellers"], None);
        // As NodeRestriction and the Node authorizer know it; the role is for what the authorizer asks of an informer.
        let kubelet = Caller::administrator_as(
            cluster,
            "kubelet",
            "system:node:a",
            &["system:nodes", "labellers", "system:authenticated"],
            None,
        );
        let set = |value: Value| json!({"metadata": {"annotations": {OWN[1]: value}}});
        for caller in [&labeller, &kubelet] {
            let what = |what: &str| format!("{}: {what}", caller.name);
            for key in OWN {
                let patch = json!({"metadata": {"annotations": {key: "stolen"}}});
                refused(&what(key), "announce", caller.merge(A, &patch));
            }
            refused(&what("removal"), "announce", caller.merge(A, &set(Value::Null)));
            refused(&what("through the status"), "announce", caller.merge(A_STATUS, &set(json!("stolen"))));
            let all = json!({"metadata": {"annotations": null}});
            refused(&what("no annotations"), "announce", caller.merge(A, &all));
            allowed(&what("label"), caller.merge(A, &json!({"metadata": {"labels": {"x": caller.name}}})));
            let other = json!({"metadata": {"annotations": {"margay.io/endpoint-override": caller.name}}});
            allowed(&what("an operator's annotation"), caller.merge(A, &other));
            let beat = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "k",
                "message": caller.name, "lastHeartbeatTime": "2026-01-02T00:00:00Z"}]}});
            let beat = caller.ask("PATCH", A_STATUS, "application/strategic-merge-patch+json", &beat);
            allowed(&what("heartbeat"), beat);
            // A node that never announced anything.
            let name = format!("new-{}", caller.name);
            let mut node = announcement(&name, Some("early"));
            let made = caller.ask("POST", "/api/v1/nodes", "application/json", &node);
            refused(&what("a Node with an announcement"), "announce", made);
            node["metadata"].as_object_mut().unwrap().remove("annotations");
            let made = caller.ask("POST", "/api/v1/nodes", "application/json", &node);
            allowed(&what("a Node"), made);
            let at = format!("/api/v1/nodes/{name}");
            allowed(
                &what("its first label"),
                caller.merge(&at, &json!({"metadata": {"labels": {"x": "y"}}})),
            );
            let patch = json!({"metadata": {"annotations": {OWN[1]: "first"}}});
            refused(&what("its first annotation"), "announce", caller.merge(&at, &patch));
            allowed(&what("deletion"), caller.ask("DELETE", &at, "", &Value::Null));
        }
        let node = cluster.get("node", None, "a").unwrap();
        assert_eq!(node["metadata"]["annotations"][OWN[1]], json!("first"));

        // Who has all rights has this one too; and whom a role gives it.
        let hand = json!({"metadata": {"annotations": {OWN[1]: "by hand"}}});
        cluster.patch("node", None, "a", &hand).unwrap();
        let role = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: announcer}
rules: [{apiGroups: [''], resources: [nodes], verbs: [announce]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: announcer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: announcer}
subjects: [{kind: User, name: cloud, apiGroup: rbac.authorization.k8s.io}]
";
        cluster.apply(role).unwrap();
        wait::until("the role to count", PATIENCE, || {
            Ok((labeller.merge(A, &set(json!("by role"))).status == 200).then_some(()))
        })
        .unwrap();
        refused("a kubelet", "announce", kubelet.merge(A, &set(json!("stolen"))));
        // And the agent puts it right.
        allowed("repair", announce(&a, "a", Some("second")));
    });
}
