//! The API server's defaults.
#![allow(clippy::unwrap_used)]

use ebpf_policy::model::{NetworkPolicy, Peer, PortNumber, Protocol};

use super::*;

fn of(kind: Kind, text: &str) -> Object {
    let value: Value = serde_saphyr::from_str(text).unwrap();
    let decoded = decode(kind, &value);
    assert_eq!(decoded.problems, Problems::default(), "{text}");
    decoded.object.unwrap()
}

fn policy(spec: &str) -> NetworkPolicy {
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {{podSelector: {{}}, {spec}}}"
    );
    match of(Kind::NetworkPolicy, &text) {
        Object::Policy(policy) => *policy,
        other => panic!("{other:?}"),
    }
}

fn pod(text: &str) -> Pod {
    match of(Kind::Pod, &format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\n{text}")) {
        Object::Pod(pod, _) => Pod::clone(&pod),
        other => panic!("{other:?}"),
    }
}

#[test]
fn policy_types_default_to_ingress_and_to_egress_with_egress_rules() {
    for (spec, ingress, egress) in [
        ("", Some(0), None),
        ("ingress: [{}]", Some(1), None),
        ("egress: []", Some(0), None),
        ("egress: [{}]", Some(0), Some(1)),
        ("policyTypes: [], egress: [{}]", Some(0), Some(1)),
        ("policyTypes: [Egress], ingress: [{}]", None, Some(0)),
        ("policyTypes: [Egress, Ingress], ingress: null", Some(0), Some(0)),
    ] {
        let policy = policy(spec);
        let counts = (policy.ingress.map(|rules| rules.len()), policy.egress.map(|rules| rules.len()));
        assert_eq!(counts, (ingress, egress), "{spec}");
    }
}

#[test]
fn ports_default_to_tcp_and_to_all_numbers() {
    let policy =
        policy("ingress: [{ports: [{}, {protocol: UDP}, {port: 80}, {port: web}, {port: 80, endPort: 90}]}]");
    let ports = policy.ingress.unwrap().remove(0).ports;
    let ports: Vec<_> = ports.into_iter().map(|port| (port.protocol, port.number)).collect();
    assert_eq!(
        ports,
        [
            (Protocol::Tcp, PortNumber::All),
            (Protocol::Udp, PortNumber::All),
            (Protocol::Tcp, PortNumber::Range(80, 80)),
            (Protocol::Tcp, PortNumber::Named("web".into())),
            (Protocol::Tcp, PortNumber::Range(80, 90)),
        ]
    );
}

#[test]
fn empty_lists_of_peers_and_ports_mean_all_and_selectors_keep_apart() {
    let policy =
        policy("ingress: [{from: [], ports: []}, {from: [{podSelector: {}}, {namespaceSelector: {}}]}]");
    assert_eq!(policy.namespace, "default");
    let rules = policy.ingress.unwrap();
    assert!(rules[0].peers.is_empty() && rules[0].ports.is_empty() && rules[0].invalid.is_none());
    let selectors: Vec<_> = rules[1]
        .peers
        .iter()
        .map(|peer| match peer {
            Peer::Pods { namespace_selector, pod_selector } => {
                (namespace_selector.is_some(), pod_selector.is_some())
            }
            Peer::IpBlock { .. } => panic!("{peer:?}"),
        })
        .collect();
    assert_eq!(selectors, [(false, true), (true, false)]);
}

#[test]
fn a_pods_addresses_ports_and_state_are_read() {
    let pod = pod(
        "spec:\n  nodeName: node\n  containers:\n  - {name: c, ports: [{containerPort: 80, name: web}, {containerPort: 53, name: dns, protocol: UDP}, {containerPort: 9}]}\n  \
         initContainers:\n  - {name: once, ports: [{containerPort: 1, name: 'no'}]}\n  - {name: sidecar, restartPolicy: Always, ports: [{containerPort: 2, name: side}]}\n\
         status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}",
    );
    assert_eq!(pod.ips.len(), 2);
    let ports: Vec<_> =
        pod.ports.iter().map(|port| (port.name.as_str(), port.number, port.protocol)).collect();
    assert_eq!(ports, [("web", 80, Protocol::Tcp), ("dns", 53, Protocol::Udp), ("side", 2, Protocol::Tcp)]);
    assert!(!pod.finished && !pod.terminating && !pod.host_network);
}

#[test]
fn a_single_address_or_prefix_stands_for_the_list() {
    assert_eq!(pod("status: {podIP: 10.0.0.1, phase: Failed}").ips.len(), 1);
    assert!(pod("status: {podIP: 10.0.0.1, phase: Failed}").finished);
    let node =
        of(Kind::Node, "apiVersion: v1\nkind: Node\nmetadata: {name: node}\nspec: {podCIDR: 10.0.0.0/24}");
    assert!(matches!(node, Object::Node(node) if node.pod_cidrs.len() == 1));
}

#[test]
fn a_namespace_always_has_its_name_as_a_label() {
    let text =
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: ns, labels: {kubernetes.io/metadata.name: lie}}";
    let Object::Namespace(labels) = of(Kind::Namespace, text) else { panic!() };
    assert_eq!(labels["kubernetes.io/metadata.name"], "ns");
}

#[test]
fn a_broken_policy_isolates_at_least_what_was_meant() {
    let salvaged = |spec: &str| {
        let text = format!("{{metadata: {{name: p}}, spec: {spec}}}");
        let value: Value = serde_saphyr::from_str(&text).unwrap();
        let decoded = decode(Kind::NetworkPolicy, &value);
        assert!(decoded.problems.is_refused());
        let Some(Object::Policy(policy)) = decoded.object else { panic!() };
        assert!(policy.invalid.is_some());
        (policy.pod_selector.match_labels.len(), policy.ingress.is_some(), policy.egress.is_some())
    };
    assert_eq!(
        salvaged("{podSelector: {matchLabels: {a: b}}, policyTypes: [Ingress], ingress: 1}"),
        (1, true, false)
    );
    assert_eq!(salvaged("{podSelector: {matchLabels: {a: b}}, policyTypes: x}"), (1, true, true));
    assert_eq!(salvaged("{podSelector: 7, policyTypes: [Egress]}"), (0, false, true));
    assert_eq!(salvaged("7"), (0, true, true));
}

#[test]
fn overrides_apply_to_the_nodes_they_select_the_later_over_the_earlier() {
    let text = "apiVersion: margay.io/v1alpha1\nkind: MeshConfiguration\nmetadata: {name: default}\nspec:\n  pools: [{cidr: 10.0.0.0/8}]\n  \
                overrides:\n  - {nodeSelector: {matchLabels: {edge: yes1}}, mtu: 1300, persistentKeepalive: 25}\n  - {nodeSelector: {}, mtu: 1380}\n";
    let Object::Mesh(spec) = of(Kind::MeshConfiguration, text) else { panic!() };
    let plain = spec.for_node(&Labels::new());
    assert_eq!(
        (plain.mtu, plain.persistent_keepalive, plain.listen_port),
        (1380, 0, mesh_api::defaults::PORT)
    );
    assert!(plain.masquerade && plain.strict_encryption && plain.pools.len() == 1);
    let edge = spec.for_node(&Labels::from([("edge".into(), "yes1".into())]));
    assert_eq!((edge.mtu, edge.persistent_keepalive), (1380, 25));
}
