#![allow(clippy::unwrap_used)]
use ebpf_policy::model::{ClusterView, LabelSelector, NetworkPolicy, Pod, Rule};

use super::*;
use crate::reconcile::netlink::LinkState;
use crate::snapshot::{Endpoint, ObjectRef};

fn endpoint(pod: &str, ifindex: u32, ip: &str) -> Endpoint {
    Endpoint {
        pod: ObjectRef { namespace: "default".into(), name: pod.into() },
        container_id: "c".into(),
        ifname: "eth0".into(),
        ifindex,
        pod_mac: [2; 6],
        ips: vec![ip.parse().unwrap()],
    }
}

fn pod(name: &str, ip: &str) -> Pod {
    Pod {
        namespace: "default".into(),
        name: name.into(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        ips: vec![ip.parse().unwrap()],
        ..Pod::default()
    }
}

fn selects(name: &str) -> LabelSelector {
    LabelSelector {
        match_labels: [("app".to_owned(), name.to_owned())].into(),
        match_expressions: Vec::new(),
    }
}

fn desired() -> Desired {
    let deny = NetworkPolicy {
        namespace: "default".into(),
        name: "deny".into(),
        pod_selector: selects("web"),
        ingress: Some(vec![Rule { invalid: Some("ports[0].port: 0".into()), ..Rule::default() }]),
        ..NetworkPolicy::default()
    };
    let view = ClusterView {
        pods: vec![pod("web", "10.1.1.2").into(), pod("db", "10.1.1.3").into()],
        namespaces: [("default".to_owned(), Default::default())].into(),
        policies: vec![deny],
        ..ClusterView::default()
    };
    let endpoints = [
        ("mgyweb".to_owned(), endpoint("web", 4, "10.1.1.2")),
        ("mgydb".to_owned(), endpoint("db", 5, "10.1.1.3")),
        ("mgynew".to_owned(), endpoint("unknown", 6, "10.1.1.4")),
    ];
    Desired {
        generation: 9,
        policy: desired::Policy { view, endpoints: endpoints.into(), ..Default::default() }.into(),
        ..Desired::default()
    }
}

#[test]
fn status_says_which_pods_a_policy_selects_and_how_each_endpoint_stands() {
    let desired = desired();
    let compiled = compile(&desired.policy.view, &local_endpoints(&desired.policy), &ranges(&desired.policy));
    let (policies, endpoints) = describe::describe(&desired, &compiled, &[]);
    assert_eq!(policies[0].selects, ["default/web"]);
    assert_eq!(policies[0].policy_types, ["Ingress"]);
    assert_eq!(policies[0].enforced, 9);
    assert_eq!(policies[0].issue.as_deref(), Some("ingress[0]: ports[0].port: 0"));
    let states: Vec<_> = endpoints.iter().map(|(name, state)| (name.as_str(), state.as_str())).collect();
    assert_eq!(states, [("mgydb", "open"), ("mgynew", "closed"), ("mgyweb", "policed")]);
}

#[test]
fn an_endpoint_without_programs_counts_as_closed() {
    let desired = desired();
    let compiled = compile(&desired.policy.view, &local_endpoints(&desired.policy), &ranges(&desired.policy));
    let errors = [ReconcileError::new("link mgydb", "EPERM")];
    let (_, endpoints) = describe::describe(&desired, &compiled, &errors);
    assert_eq!(endpoints["mgydb"], "closed");
}

#[test]
fn a_pods_interface_is_never_detached_and_a_former_tunnel_is() {
    let attached = |ifname: &str, role| Attached { ifindex: 1, ifname: ifname.into(), role };
    let devices = [
        attached("mgygone", Role::Pod),
        attached("margay1", Role::Tunnel),
        attached("margay0", Role::Tunnel),
        attached("eth0", Role::Exit(Framing::Ethernet)),
    ];
    let policy = desired::Policy { tunnels: ["margay0".to_owned()].into(), ..Default::default() };
    assert_eq!(superfluous(&policy, &devices), ["margay1"]);
}

#[test]
fn every_device_that_packets_may_leave_by_is_watched() {
    let link = |layer| LinkState { index: 1, mtu: 1500, up: true, kind: String::new(), layer };
    let links: Links = [
        ("lo", LinkLayerType::Loopback),
        ("eth0", LinkLayerType::Ether),
        ("ppp0", LinkLayerType::Ppp),
        ("margay0", LinkLayerType::None),
        ("margay1", LinkLayerType::None),
        ("mgydb", LinkLayerType::Ether),
        ("mgyold", LinkLayerType::Ether),
    ]
    .map(|(name, layer)| (name.to_owned(), link(layer)))
    .into();
    let attached = |ifname: &str, role| Attached { ifindex: 1, ifname: ifname.into(), role };
    let devices = [attached("margay0", Role::Exit(Framing::Ip)), attached("mgyold", Role::Pod)];
    let tunnels = ["margay0".to_owned(), "margay1".to_owned(), "margay9".to_owned()].into();
    let policy = desired::Policy { tunnels, ..desired::Policy::clone(&desired().policy) };
    let wanting = wanting(&policy, &devices, &links);
    let expected = [
        ("eth0", Role::Exit(Framing::Ethernet)),
        ("margay0", Role::Tunnel),
        ("margay1", Role::Tunnel),
        ("mgydb", Role::Pod),
        ("ppp0", Role::Exit(Framing::Ip)),
    ];
    assert_eq!(wanting, expected);
}

#[tokio::test]
async fn without_programs_pods_are_refused_with_the_reason_and_the_pass_fails() {
    // Not a bpffs: nothing can be pinned here.
    let directory = tempfile::tempdir().unwrap();
    let engine = Engine::open(&directory.path().join("pins"));
    let refused = engine.ready().unwrap_err();
    assert!(refused.starts_with("policy cannot be enforced: "), "{refused}");
    assert!(engine.attach_closed("lo").is_err());
    let board = Board::new(&["policy"]);
    let mut reconciler = PolicyReconciler::new(engine, board, Netlink::connect().unwrap());
    let error = reconciler.pass(&desired(), &Links::new()).unwrap_err();
    assert_eq!(error.object, "policy engine");
}
