//! Real packets between pods on real veths.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeMap;

use common::{Host, PATIENCE, Pod, SILENCE, eventually, ip, on_a_host, ping_stream};
use ebpf_policy::model::{
    ClusterView, Direction, LabelSelector, Labels, LocalEndpoint, NetworkPolicy, Peer, Port, PortNumber,
    Protocol, Ranges, Rule,
};
use ebpf_policy::{AttachMode, Compiled, Enforcer, Event, Options, compile, model};

const PORT: u16 = 8080;

fn labels(app: &str) -> Labels {
    [("app".to_owned(), app.to_owned())].into()
}

fn app(app: &str) -> LabelSelector {
    LabelSelector { match_labels: labels(app), match_expressions: vec![] }
}

/// Pods in namespace `shop`, each labelled with its own name.
fn view(pods: &[&Pod], policies: Vec<NetworkPolicy>) -> ClusterView {
    let pod = |pod: &&Pod| model::Pod {
        namespace: "shop".into(),
        name: pod.name.clone(),
        labels: labels(&pod.name),
        ips: pod.ips.clone(),
        ..Default::default()
    };
    ClusterView {
        pods: pods.iter().map(pod).map(Into::into).collect(),
        namespaces: BTreeMap::from([("shop".to_owned(), Labels::new())]),
        policies,
        ..ClusterView::default()
    }
}

fn policy(name: &str, selects: &str, ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> NetworkPolicy {
    NetworkPolicy {
        namespace: "shop".into(),
        name: name.into(),
        pod_selector: app(selects),
        ingress,
        egress,
        invalid: None,
    }
}

fn from_app(peer: &str, protocol: Protocol, port: u16) -> Rule {
    Rule {
        peers: vec![Peer::Pods { namespace_selector: None, pod_selector: Some(app(peer)) }],
        ports: vec![Port { protocol, number: PortNumber::Range(port, port) }],
        invalid: None,
    }
}

fn endpoints(pods: &[&Pod]) -> Vec<LocalEndpoint> {
    pods.iter().map(|pod| pod.endpoint("shop")).collect()
}

fn compiled(pods: &[&Pod], policies: Vec<NetworkPolicy>) -> Compiled {
    compile(&view(pods, policies), &endpoints(pods), &Ranges::default())
}

fn open(host: &Host, pods: &[&Pod]) -> Enforcer {
    let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
    for pod in pods {
        enforcer.attach_pod(&pod.ifname).unwrap();
    }
    enforcer
}

fn drain(enforcer: &Enforcer, names: &Compiled) -> Vec<Event> {
    let mut events = enforcer.events().unwrap();
    std::iter::from_fn(|| events.next_event(names)).collect()
}

#[test]
fn an_attached_pod_is_closed_until_policy_knows_it() {
    on_a_host(|host| {
        let (a, b) = (host.pod("a", &["10.1.0.1"]), host.pod("b", &["10.1.0.2"]));
        b.serve_tcp(PORT);
        assert!(a.reaches(&b, PORT));
        let mut enforcer = open(host, &[&a, &b]);
        assert!(!enforcer.adopted());
        assert!(a.is_cut_off(&b, PORT));
        enforcer.apply(&compiled(&[&a, &b], vec![])).unwrap();
        assert!(a.reaches(&b, PORT));

        // A pod that nobody knows is closed explicitly.
        let unknown = compile(&ClusterView::default(), &endpoints(&[&a, &b]), &Ranges::default());
        enforcer.apply(&unknown).unwrap();
        assert!(a.is_cut_off(&b, PORT));
        assert!(drain(&enforcer, &unknown).iter().any(|event| event.reason == "closed"));
    });
}

fn allow_and_deny(mode: AttachMode, ips: [&'static str; 3]) {
    on_a_host(move |host| {
        let (a, b, c) = (host.pod("a", &[ips[0]]), host.pod("b", &[ips[1]]), host.pod("c", &[ips[2]]));
        let pods = [&a, &b, &c];
        a.serve_tcp(PORT);
        a.serve_udp(PORT);
        b.serve_tcp(PORT);
        let mut enforcer = Enforcer::open(&Options { attach: mode, ..Options::new(host.pin_dir()) }).unwrap();
        for pod in pods {
            enforcer.attach_pod(&pod.ifname).unwrap();
        }
        let rules = vec![from_app("b", Protocol::Tcp, PORT)];
        let names = compiled(&pods, vec![policy("only-b", "a", Some(rules), None)]);
        enforcer.apply(&names).unwrap();

        assert!(b.reaches(&a, PORT));
        assert!(c.is_cut_off(&a, PORT));
        assert!(!b.udp(&a, PORT, 10, SILENCE), "TCP does not stand for UDP");
        assert!(a.reaches(&b, PORT), "isolated in ingress, not in egress; replies need no rule");

        let events = drain(&enforcer, &names);
        let denied = events.iter().find(|event| event.source == c.ips[0]).unwrap();
        assert_eq!(denied.pod.as_ref().unwrap().to_string(), "shop/a");
        assert_eq!(denied.direction, Direction::Ingress);
        assert_eq!((denied.destination, denied.destination_port, denied.protocol), (a.ips[0], PORT, 6));
        assert_eq!(denied.reason, "default_deny");
        assert_eq!(denied.policies, ["shop/only-b"]);
        assert_eq!(enforcer.events_lost().unwrap(), 0);

        let counters = enforcer.counters().unwrap();
        assert!(counters.iter().any(|counter| counter.ifindex == a.ifindex
            && counter.direction == Direction::Ingress
            && counter.reason == "default_deny"
            && !counter.allowed
            && counter.packets >= 2));

        enforcer.detach(&a.ifname).unwrap();
        assert!(c.reaches(&a, PORT));
        assert_eq!(enforcer.attached().unwrap().len(), 2);
    });
}

#[test]
fn policy_allows_and_denies_over_ipv4() {
    allow_and_deny(AttachMode::Tcx, ["10.1.0.1", "10.1.0.2", "10.1.0.3"]);
}

#[test]
fn policy_allows_and_denies_over_ipv6() {
    allow_and_deny(AttachMode::Auto, ["fd00:1::1", "fd00:1::2", "fd00:1::3"]);
}

#[test]
fn clsact_enforces_as_tcx_does() {
    allow_and_deny(AttachMode::Clsact, ["10.1.0.1", "10.1.0.2", "10.1.0.3"]);
}

#[test]
fn enforcement_outlives_the_agent_and_is_adopted_with_its_connections() {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        on_a_host(move |host| {
            let (a, b, c) =
                (host.pod("a", &["10.1.0.1"]), host.pod("b", &["10.1.0.2"]), host.pod("c", &["10.1.0.3"]));
            let pods = [&a, &b, &c];
            a.serve_tcp(PORT);
            let options = Options { attach: mode, ..Options::new(host.pin_dir()) };
            let policies = vec![policy("only-b", "a", Some(vec![from_app("b", Protocol::Tcp, PORT)]), None)];
            let names = compiled(&pods, policies);
            let mut enforcer = Enforcer::open(&options).unwrap();
            for pod in pods {
                enforcer.attach_pod(&pod.ifname).unwrap();
            }
            enforcer.apply(&names).unwrap();
            let mut stream = b.connect(&a, PORT, PATIENCE).unwrap();
            assert!(ping_stream(&mut stream, PATIENCE));

            drop(enforcer);
            assert!(ping_stream(&mut stream, PATIENCE));
            assert!(c.is_cut_off(&a, PORT));
            assert!(b.reaches(&a, PORT));

            let mut enforcer = Enforcer::open(&options).unwrap();
            assert!(enforcer.adopted());
            assert_eq!(enforcer.attached().unwrap().len(), 3);
            assert!(c.is_cut_off(&a, PORT), "adoption opens nothing");
            let report = enforcer.apply(&names).unwrap();
            assert_eq!((report.written, report.removed), (0, 0), "nothing changed");
            assert!(ping_stream(&mut stream, PATIENCE));
            let denied = drain(&enforcer, &names);
            assert!(denied.iter().any(|event| event.source == c.ips[0] && event.policies == ["shop/only-b"]));

            Enforcer::cleanup(&host.pin_dir()).unwrap();
            assert!(!host.pin_dir().exists());
            assert!(c.reaches(&a, PORT));
            Enforcer::cleanup(&host.pin_dir()).unwrap();
        });
    }
}

#[test]
fn a_policy_change_cuts_what_it_no_longer_allows_and_nothing_else() {
    on_a_host(|host| {
        let (a, b, c) =
            (host.pod("a", &["10.1.0.1"]), host.pod("b", &["10.1.0.2"]), host.pod("c", &["10.1.0.3"]));
        let pods = [&a, &b, &c];
        a.serve_tcp(PORT);
        let mut enforcer = open(host, &pods);
        let with = |peers: &[&str]| {
            let rules = peers.iter().map(|peer| from_app(peer, Protocol::Tcp, PORT)).collect();
            compiled(&pods, vec![policy("some", "a", Some(rules), None)])
        };
        enforcer.apply(&with(&["b", "c"])).unwrap();
        let mut from_b = b.connect(&a, PORT, PATIENCE).unwrap();
        let mut from_c = c.connect(&a, PORT, PATIENCE).unwrap();
        assert!(ping_stream(&mut from_b, PATIENCE) && ping_stream(&mut from_c, PATIENCE));

        enforcer.apply(&with(&["b"])).unwrap();
        assert!(ping_stream(&mut from_b, PATIENCE));
        assert!(!ping_stream(&mut from_c, SILENCE));

        // Allowed again, it goes on where it was.
        enforcer.apply(&with(&["b", "c"])).unwrap();
        let mut answer = [0; 4];
        from_c.set_read_timeout(Some(PATIENCE)).unwrap();
        std::io::Read::read_exact(&mut from_c, &mut answer).unwrap();
        assert_eq!(&answer, b"ping");
    });
}

#[test]
fn the_local_node_always_reaches_its_pods() {
    on_a_host(|host| {
        let (a, b) = (host.pod("a", &["10.1.0.1"]), host.pod("b", &["10.1.0.2"]));
        ip("addr add 10.9.9.9/32 dev lo");
        a.serve_tcp(PORT);
        let mut enforcer = open(host, &[&a, &b]);
        enforcer.apply(&compiled(&[&a, &b], vec![policy("deny", "a", Some(vec![]), Some(vec![]))])).unwrap();
        assert!(b.is_cut_off(&a, PORT));
        // The test's thread is the node.
        let address = std::net::SocketAddr::new(a.ips[0], PORT);
        let mut stream = std::net::TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        assert!(ping_stream(&mut stream, PATIENCE));
        // By origin, never by address: a pod that borrows the node's address is a forger.
        b.run(|| {
            ip("addr add 10.9.9.9/32 dev lo");
            let socket = std::net::UdpSocket::bind("10.9.9.9:0").unwrap();
            socket.send_to(b"hi", "10.1.0.1:1").unwrap();
        });
        eventually("a forged source is counted", || {
            enforcer.counters().unwrap().iter().any(|c| c.ifindex == b.ifindex && c.reason == "spoofed")
        });
    });
}

#[test]
fn fragments_of_an_allowed_datagram_pass() {
    for ips in [["10.1.0.1", "10.1.0.2"], ["fd00:1::1", "fd00:1::2"]] {
        on_a_host(move |host| {
            let (a, b) = (host.pod("a", &[ips[0]]), host.pod("b", &[ips[1]]));
            a.serve_udp(PORT);
            let mut enforcer = open(host, &[&a, &b]);
            let rules = vec![from_app("b", Protocol::Udp, PORT)];
            let names = compiled(&[&a, &b], vec![policy("only-b", "a", Some(rules), None)]);
            enforcer.apply(&names).unwrap();
            assert!(b.udp(&a, PORT, 4000, PATIENCE), "{:?}", drain(&enforcer, &names));
            assert!(!b.udp(&a, PORT + 1, 4000, SILENCE));
        });
    }
}
