//! Services: the real kube-proxy with its nftables rules between pods, tunnel and policy. A policy names pods, and what a pod
//! sends to a Service is judged by the backend it gets to.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::{address, bins, nodes};
use netns_tests::lab::Lab;
use netns_tests::probe::{self, Outcome, Probe};
use netns_tests::spec::Protocol;
use netns_tests::wait;
use serde_json::{Value, json};

const SERVER: &str = "apiServer: {ips: [192.0.2.100, '2001:db8::100']}\n";
const LONG: Duration = Duration::from_secs(60);
/// Of the node's own processes.
const HOST_PORT: u16 = 9000;

/// A Service with one backend, reached at its cluster IPs on port 80 and at `node_port` of every node.
struct Service {
    name: &'static str,
    node_port: u16,
    /// Who answers.
    listener: &'static str,
    ips: Vec<IpAddr>,
    vips: Vec<IpAddr>,
}

struct World {
    lab: Lab,
    services: Vec<Service>,
}

/// How a client addresses a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    ClusterIp,
    NodePort(&'static str),
}

impl World {
    fn service(&self, name: &str) -> &Service {
        self.services.iter().find(|service| service.name == name).unwrap()
    }

    /// Makes the Service and, since no controller does, its EndpointSlices.
    fn add(&mut self, name: &'static str, backend: (&'static str, &'static str, u16), local: Option<&str>) {
        let node_port = 30_001 + self.services.len() as u16;
        let (listener, node, port) = backend;
        let ips = match listener.strip_prefix("d/") {
            Some(pod) => self.lab.pod("d", pod).unwrap().ips.clone(),
            None => self.lab.ips(node).unwrap(),
        };
        let ports = |with: &dyn Fn(&str) -> Value| [with("TCP"), with("UDP")].to_vec();
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "d", "name": name},
            "spec": {
                "type": "NodePort", "ipFamilyPolicy": "RequireDualStack",
                "ports": ports(&|protocol| json!({
                    "name": protocol.to_lowercase(), "protocol": protocol, "port": 80, "targetPort": port,
                    "nodePort": node_port,
                })),
            },
        });
        if let Some(field) = local {
            service["spec"][field] = "Local".into();
        }
        let mut objects = vec![service];
        for (family, v6) in [("IPv4", false), ("IPv6", true)] {
            let ip = ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "namespace": "d", "name": format!("{name}-{}", family.to_lowercase()),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": family,
                "endpoints": [{"addresses": [ip], "nodeName": node, "conditions": {"ready": true}}],
                "ports": ports(&|protocol| json!({
                    "name": protocol.to_lowercase(), "protocol": protocol, "port": port,
                })),
            }));
        }
        let cluster = self.lab.cluster().unwrap();
        for object in &objects {
            cluster.client().apply(object).unwrap();
        }
        let object = cluster.get("service", Some("d"), name).unwrap();
        let vips = object["spec"]["clusterIPs"].as_array().unwrap();
        let vips = vips.iter().map(|ip| ip.as_str().unwrap().parse().unwrap()).collect();
        self.services.push(Service { name, node_port, listener, ips, vips });
    }

    /// Probes of one client to a Service, in both families and protocols. A client is a pod, or a node's own process.
    fn probes(&self, client: &str, service: &str, to: To) -> Vec<Probe> {
        let service = self.service(service);
        let mut list = Vec::new();
        for v6 in [false, true] {
            let of_family = |ips: &[IpAddr]| *ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
            let (from, src) = match self.lab.pod("d", client) {
                Ok(pod) => (pod.netns.clone(), address(pod, v6)),
                Err(_) => (
                    self.lab.host(client).unwrap().netns().clone(),
                    of_family(&self.lab.ips(client).unwrap()),
                ),
            };
            let (dst, port) = match to {
                To::ClusterIp => (of_family(&service.vips), 80),
                To::NodePort(node) => (of_family(&self.lab.ips(node).unwrap()), service.node_port),
            };
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let from = from.clone();
                list.push(Probe { from, src, dst, port, protocol, listener: service.listener.to_owned() });
            }
        }
        list
    }

    /// Checks that of these exactly the expected ones get there, and that the others hear nothing at all.
    fn check(&self, what: &str, cases: &[(&str, &str, To, bool)]) {
        let all = cases.iter().flat_map(|(client, service, to, expected)| {
            let probes = self.probes(client, service, *to);
            probes.into_iter().map(move |probe| (probe, (*client, *service, *to, *expected)))
        });
        let (probes, cases): (Vec<_>, Vec<_>) = all.map(|(probe, case)| ((probe, case.3), case)).unzip();
        let mut wrong = Vec::new();
        for (((probe, _), case), outcome) in probes.iter().zip(cases).zip(probe::all(&probes).unwrap()) {
            let wanted = if case.3 { Outcome::Allowed } else { Outcome::Dropped };
            if outcome != wanted {
                let (client, service, to, _) = case;
                wrong.push(format!(
                    "{client} to {service} by {to:?} ({} {}): {outcome}, not {wanted}",
                    probe.dst, probe.protocol
                ));
            }
        }
        assert!(wrong.is_empty(), "{what}:\n{}\n{}", wrong.join("\n"), self.lab.logs("a"));
    }

    fn put(&mut self, policy: &str) {
        self.lab.put(serde_saphyr::from_str(policy).unwrap()).unwrap();
        self.lab.enforced().unwrap();
    }

    fn delete(&mut self, name: &str) {
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "d", "name": name},
        });
        self.lab.delete(&policy).unwrap();
        self.lab.enforced().unwrap();
    }
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: d, name: {name}}}\nspec: {spec}\n"
    )
}

/// Two nodes with kube-proxy. On a: `pa`, its neighbour `pl`, and a process of the node's own; on b: `pb` and a process.
fn up() -> World {
    let ports = "ports: [{name: web, port: 8080}, {port: 8080, protocol: UDP}]";
    let more = format!("  - {{namespace: d, name: pl, node: a, labels: {{app: l}}, {ports}}}\n{SERVER}");
    let lab = Lab::up(nodes("ab", &more), &bins()).unwrap();
    for node in ["a", "b"] {
        for ip in lab.ips(node).unwrap() {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                lab.listen_on_host(node, ip, HOST_PORT, protocol).unwrap();
            }
        }
        let pods = ["10.244.0.0/16".to_owned(), "fd00:10:244::/48".to_owned()];
        lab.cluster().unwrap().start_proxy(lab.host(node).unwrap(), &pods).unwrap();
    }
    let mut world = World { lab, services: Vec::new() };
    world.add("self", ("d/pa", "a", 8080), None);
    world.add("near", ("d/pl", "a", 8080), None);
    world.add("far", ("d/pb", "b", 8080), None);
    world.add("near-host", ("a", "a", HOST_PORT), None);
    world.add("far-host", ("b", "b", HOST_PORT), None);
    world.add("far-kept", ("d/pb", "b", 8080), Some("externalTrafficPolicy"));
    world.add("far-inner", ("d/pb", "b", 8080), Some("internalTrafficPolicy"));
    wait::until("kube-proxy to know every Service", LONG, || {
        for node in ["a", "b"] {
            for family in ["ip", "ip6"] {
                let rules = world.lab.host(node)?.run(&["nft", "list", "table", family, "kube-proxy"])?;
                for service in &world.services {
                    let port = service.node_port.to_string();
                    anyhow::ensure!(rules.contains(&port), "{node} {family} {}", service.name);
                }
            }
        }
        Ok(Some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", world.lab.host("a").unwrap().log("kube-proxy")));
    world
}

use To::{ClusterIp, NodePort};

#[test]
fn a_service_is_what_its_backends_are() {
    let mut world = up();
    let everything: Vec<(&str, &str, To, bool)> = ["self", "near", "far", "near-host", "far-host"]
        .into_iter()
        .flat_map(|service| {
            ["pa", "pb", "a", "b"].into_iter().flat_map(move |client| {
                [ClusterIp, NodePort("a"), NodePort("b")].map(|to| (client, service, to, true))
            })
        })
        .collect();
    world.check("without policy", &everything);
    world.check(
        "traffic policies",
        &[
            // Only a node that has a backend passes on what comes from outside; pods and the node itself count as inside.
            ("b", "far-kept", NodePort("b"), true),
            ("a", "far-kept", NodePort("b"), true),
            ("pa", "far-kept", NodePort("b"), true),
            ("pa", "far-kept", NodePort("a"), true),
            ("pa", "far-kept", ClusterIp, true),
            ("b", "far-kept", NodePort("a"), false),
            // Only a node that has a backend passes on what comes from inside.
            ("pb", "far-inner", ClusterIp, true),
            ("b", "far-inner", ClusterIp, true),
            ("pa", "far-inner", ClusterIp, false),
        ],
    );

    // Egress: the policy names pods, and a Service is what is behind it.
    world.put(&policy(
        "out",
        "{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: web}, {port: 8080, protocol: UDP}]}]}",
    ));
    let far_only = [
        ("pa", "far", ClusterIp, true),
        ("pa", "far", NodePort("a"), true),
        ("pa", "far-kept", ClusterIp, true),
        ("pa", "self", ClusterIp, true),
        ("pa", "near", ClusterIp, false),
        ("pa", "near", NodePort("a"), false),
        ("pa", "near-host", ClusterIp, false),
        ("pa", "near-host", NodePort("a"), false),
        ("pa", "far-host", ClusterIp, false),
        // Another node's address is no backend: what that node does with the packet is not known here.
        ("pa", "far", NodePort("b"), false),
        // Nobody else is concerned.
        ("pl", "near-host", ClusterIp, true),
        ("pb", "near", ClusterIp, true),
        ("a", "self", ClusterIp, true),
    ];
    world.check("egress to the far pod", &far_only);
    let denied = world.lab.agent("a").unwrap().events().unwrap();
    let near = &world.service("near").ips;
    let of_near =
        denied.iter().find(|event| near.contains(&event.dst)).unwrap_or_else(|| panic!("{denied:?}"));
    assert_eq!(of_near.policies, ["d/out"], "{of_near:?}");
    assert_eq!(of_near.endpoint, "d/pa", "{of_near:?}");

    world.put(&policy(
        "out",
        "{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: l}}}]}]}",
    ));
    world.check(
        "egress to the near pod",
        &[
            ("pa", "near", ClusterIp, true),
            ("pa", "near", NodePort("a"), true),
            ("pa", "far", ClusterIp, false),
            ("pa", "far", NodePort("a"), false),
            ("pa", "near-host", ClusterIp, false),
        ],
    );
    world.put(&policy(
        "out",
        "{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: '2001:db8::/64'}}], ports: [{port: 9000}, {port: 9000, protocol: UDP}]}]}",
    ));
    world.check(
        "egress to nodes",
        &[
            ("pa", "near-host", ClusterIp, true),
            ("pa", "near-host", NodePort("a"), true),
            ("pa", "far-host", ClusterIp, true),
            ("pa", "far-host", NodePort("a"), true),
            ("pa", "near", ClusterIp, false),
            ("pa", "far", ClusterIp, false),
        ],
    );
    world.delete("out");

    // Ingress: the backend sees who asks, but for what a node masquerades.
    world.put(&policy(
        "in",
        "{podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}",
    ));
    world.check(
        "ingress from one pod",
        &[
            ("pa", "far", ClusterIp, true),
            ("pl", "far", ClusterIp, false),
            ("b", "far", ClusterIp, true),
            ("b", "far", NodePort("b"), true),
            ("a", "far", ClusterIp, false),
            // A node's port hides the pod behind the node.
            ("pa", "far", NodePort("a"), false),
            ("pb", "near", ClusterIp, true),
        ],
    );
    // Both sides.
    world.put(&policy(
        "out",
        "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: b}}}]}]}",
    ));
    world.check(
        "both sides",
        &[
            ("pa", "far", ClusterIp, true),
            ("pl", "far", ClusterIp, false),
            ("pa", "near", ClusterIp, false),
            ("pb", "near", ClusterIp, false),
            ("pb", "far", ClusterIp, true),
        ],
    );
}
