//! Random small clusters, for property tests: few names, labels, addresses and ports, so that things meet.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_policy::model::{
    ClusterView, LabelSelector, Labels, LocalEndpoint, NamedPort, NetworkPolicy, Operator, Peer, Pod, Port,
    PortNumber, Protocol, Requirement, Rule,
};
use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Addresses in use: eight of each family, four of them in one half of the pool.
pub fn address(v6: bool, host: u8) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()))
    } else {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, host))
    }
}

pub fn any_address() -> impl Strategy<Value = IpAddr> {
    (any::<bool>(), 0u8..8).prop_map(|(v6, host)| address(v6, host))
}

fn block() -> impl Strategy<Value = IpNet> {
    let lengths = select(vec![0u8, 3, 13, 8, 29, 30, 31, 32]);
    (any_address(), lengths).prop_map(|(ip, length)| {
        let length = if ip.is_ipv6() && length > 0 { length + 96 } else { length };
        IpNet::new(ip, length).unwrap()
    })
}

fn word() -> impl Strategy<Value = String> {
    select(vec!["", "a", "b"]).prop_map(str::to_owned)
}

fn labels() -> impl Strategy<Value = Labels> {
    btree_map(select(vec!["k".to_owned(), "l".to_owned()]), word(), 0..3)
}

fn requirement() -> impl Strategy<Value = Requirement> {
    let operator = select(vec![Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]);
    (select(vec!["k", "l"]), operator, vec(word(), 0..3)).prop_map(|(key, operator, values)| Requirement {
        key: key.to_owned(),
        operator,
        values,
    })
}

fn selector() -> impl Strategy<Value = LabelSelector> {
    (btree_map(select(vec!["k".to_owned(), "l".to_owned()]), word(), 0..2), vec(requirement(), 0..2))
        .prop_map(|(match_labels, match_expressions)| LabelSelector { match_labels, match_expressions })
}

fn namespace() -> impl Strategy<Value = String> {
    select(vec!["x", "y", "unknown"]).prop_map(str::to_owned)
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn port_name() -> impl Strategy<Value = String> {
    select(vec!["http", "dns"]).prop_map(str::to_owned)
}

/// Port numbers that rules, pods and packets use.
pub fn port_number() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 78u16..84, 1 => select(vec![0, 1, 53, 1024, 65_535])]
}

fn port() -> impl Strategy<Value = Port> {
    let number = prop_oneof![
        Just(PortNumber::All),
        (port_number(), port_number()).prop_map(|(a, b)| PortNumber::Range(a.min(b), a.max(b))),
        port_number().prop_map(|n| PortNumber::Range(n, n)),
        port_name().prop_map(PortNumber::Named),
    ];
    (protocol(), number).prop_map(|(protocol, number)| Port { protocol, number })
}

fn peer() -> impl Strategy<Value = Peer> {
    prop_oneof![
        (option::of(selector()), option::of(selector()))
            .prop_map(|(namespace_selector, pod_selector)| Peer::Pods { namespace_selector, pod_selector }),
        (block(), vec(block(), 0..3)).prop_map(|(cidr, except)| Peer::IpBlock { cidr, except }),
    ]
}

fn invalid() -> impl Strategy<Value = Option<String>> {
    prop_oneof![9 => Just(None), 1 => Just(Some("broken".to_owned()))]
}

fn rules() -> impl Strategy<Value = Option<Vec<Rule>>> {
    let rule = (vec(peer(), 0..3), vec(port(), 0..3), invalid()).prop_map(|(peers, ports, invalid)| Rule {
        peers,
        ports,
        invalid,
    });
    option::of(vec(rule, 0..3))
}

pub fn policies() -> impl Strategy<Value = Vec<NetworkPolicy>> {
    let policy = (namespace(), selector(), rules(), rules(), invalid());
    vec(policy, 0..5).prop_map(|list| {
        let named =
            list.into_iter().enumerate().map(|(n, (namespace, pod_selector, ingress, egress, invalid))| {
                NetworkPolicy { namespace, name: format!("p{n}"), pod_selector, ingress, egress, invalid }
            });
        named.collect()
    })
}

fn pod() -> impl Strategy<Value = Pod> {
    let named = (port_name(), protocol(), port_number()).prop_map(|(name, protocol, number)| NamedPort {
        name,
        protocol,
        number,
    });
    (namespace(), labels(), vec(any_address(), 0..3), vec(named, 0..3), 0u8..10).prop_map(
        |(namespace, labels, ips, ports, odd)| Pod {
            namespace,
            labels,
            ips,
            ports,
            host_network: odd == 0,
            finished: odd == 1,
            terminating: odd == 2,
            ..Pod::default()
        },
    )
}

/// Namespaces and pods, some of which share addresses.
pub fn cluster() -> impl Strategy<Value = ClusterView> {
    (vec(pod(), 1..7), labels(), labels(), policies()).prop_map(|(mut pods, x, y, policies)| {
        for (n, pod) in pods.iter_mut().enumerate() {
            pod.name = format!("pod{n}");
        }
        let namespaces = BTreeMap::from([("x".to_owned(), x), ("y".to_owned(), y)]);
        let pods = pods.into_iter().map(Into::into).collect();
        ClusterView { pods, namespaces, policies, ..ClusterView::default() }
    })
}

/// The first two pods live here, each with an address of either family that may be claimed elsewhere as well.
pub fn local(view: &ClusterView, ifindexes: [u32; 2]) -> Vec<LocalEndpoint> {
    let endpoints = view.pods.iter().zip(ifindexes).zip(0u8..).map(|((pod, ifindex), host)| LocalEndpoint {
        ifindex,
        ifname: format!("mgy{ifindex}"),
        pod: Some(pod.reference()),
        ips: vec![address(false, host + 1), address(true, host + 1)],
    });
    endpoints.collect()
}
