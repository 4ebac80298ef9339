//! Services: policy on what pods send to a virtual address, whose final destination is only known behind the node's DNAT.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::packet::Spec;
use common::{Host, PATIENCE, Pod, SILENCE, ip, on_a_host};
use ebpf_policy::model::{
    ClusterView, LabelSelector, Labels, NetworkPolicy, Peer, Protocol, Ranges, Rule, ServiceAddress,
};
use ebpf_policy::simulate::Simulation;
use ebpf_policy::{
    AttachMode, Compiled, Enforcer, Event, Framing, Hook, Options, Reason, Role, compile, direction, model,
};

const VIP: &str = "10.96.0.1";
const PORT: u16 = 8080;

fn labels(app: &str) -> Labels {
    [("app".to_owned(), app.to_owned())].into()
}

fn selector(app: &str) -> LabelSelector {
    LabelSelector { match_labels: labels(app), match_expressions: vec![] }
}

/// Pod `from` may open connections to these pods and blocks only.
fn egress(from: &str, apps: &[&str], blocks: &[&str]) -> NetworkPolicy {
    let pods =
        apps.iter().map(|app| Peer::Pods { namespace_selector: None, pod_selector: Some(selector(app)) });
    let blocks = blocks.iter().map(|block| Peer::IpBlock { cidr: block.parse().unwrap(), except: vec![] });
    let peers: Vec<_> = pods.chain(blocks).collect();
    let rules = if peers.is_empty() { vec![] } else { vec![Rule { peers, ..Rule::default() }] };
    NetworkPolicy {
        namespace: "shop".into(),
        name: format!("{from}-egress"),
        pod_selector: selector(from),
        egress: Some(rules),
        ..NetworkPolicy::default()
    }
}

fn service(ip: &str, port: Option<u16>) -> ServiceAddress {
    ServiceAddress { ip: ip.parse().unwrap(), port: port.map(|port| (Protocol::Tcp, port)) }
}

/// Pods in namespace `shop`, each labelled with its own name; `remote` ones are on other nodes.
fn compiled(
    local: &[&Pod],
    remote: &[(&str, IpAddr)],
    policies: Vec<NetworkPolicy>,
    services: &[ServiceAddress],
) -> Compiled {
    let pod = |name: &str, ips: Vec<IpAddr>| model::Pod {
        namespace: "shop".into(),
        name: name.into(),
        labels: labels(name),
        ips,
        ..Default::default()
    };
    let here = local.iter().map(|of| pod(&of.name, of.ips.clone()));
    let view = ClusterView {
        pods: here.chain(remote.iter().map(|(name, ip)| pod(name, vec![*ip]))).map(Arc::new).collect(),
        namespaces: BTreeMap::from([("shop".to_owned(), Labels::new())]),
        policies,
        services: services.iter().copied().collect(),
    };
    let endpoints: Vec<_> = local.iter().map(|pod| pod.endpoint("shop")).collect();
    compile(&view, &endpoints, &Ranges::default())
}

fn nft(rules: &str) {
    let mut child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{rules}");
}

/// Sends connections to the Service on to a backend, as kube-proxy does; what goes back into the device it came from is
/// masqueraded.
fn dnat(backend: &str, masquerade: bool) {
    let family = if backend.contains(':') { "ip6" } else { "ip" };
    let vip = if family == "ip6" { "fd00:96::1" } else { VIP };
    let masquerade = if masquerade { "ct status dnat masquerade" } else { "" };
    let brackets = if family == "ip6" { format!("[{backend}]") } else { backend.to_owned() };
    nft(&format!(
        "table inet proxy
         delete table inet proxy
         table inet proxy {{
           chain pre {{ type nat hook prerouting priority dstnat;
             {family} daddr {vip} tcp dport {PORT} dnat {family} to {brackets}:{PORT}
             {family} daddr {vip} udp dport {PORT} dnat {family} to {brackets}:{PORT}
             tcp dport 30080 dnat {family} to {brackets}:{PORT}
           }}
           chain post {{ type nat hook postrouting priority srcnat; {masquerade}; }}
         }}"
    ));
}

/// Whether a TCP connection from a pod to an address comes about; a refusal is a failure of the test: denied is silence.
fn reaches(from: &Pod, to: &str, port: u16, patience: Duration) -> bool {
    let address = SocketAddr::new(to.parse().unwrap(), port);
    from.run(move || match TcpStream::connect_timeout(&address, patience) {
        Ok(mut stream) => common::ping_stream(&mut stream, patience),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock) =>
        {
            false
        }
        Err(error) => panic!("denied traffic must be dropped in silence, but: {error}"),
    })
}

fn drain(enforcer: &Enforcer, names: &Compiled) -> Vec<Event> {
    let mut events = enforcer.events().unwrap();
    std::iter::from_fn(|| events.next_event(names)).collect()
}

/// Pods `a` and `b` with programs, and `far` behind a device that is only a way out.
fn open(host: &Host, mode: AttachMode, ips: [&str; 3]) -> (Enforcer, Pod, Pod, Pod) {
    let (a, b, far) = (host.pod("a", &[ips[0]]), host.pod("b", &[ips[1]]), host.pod("far", &[ips[2]]));
    // For masquerading.
    ip("addr add 192.0.2.254/32 dev lo");
    ip("addr add 2001:db8::1/128 dev lo nodad");
    for pod in [&a, &b, &far] {
        pod.serve_tcp(PORT);
        pod.serve_udp(PORT);
    }
    let mut enforcer = Enforcer::open(&Options { attach: mode, ..Options::new(host.pin_dir()) }).unwrap();
    for pod in [&a, &b] {
        enforcer.attach_pod(&pod.ifname).unwrap();
    }
    enforcer.attach(&far.ifname, Role::Exit(Framing::Ethernet)).unwrap();
    (enforcer, a, b, far)
}

fn backends_decide(mode: AttachMode, vip: &'static str, ips: [&'static str; 3]) {
    on_a_host(move |host| {
        let (mut enforcer, a, b, far) = open(host, mode, ips);
        let services = [service(vip, None)];
        let remote = [("far", far.ips[0])];
        let of = |apps: &[&str]| compiled(&[&a, &b], &remote, vec![egress("a", apps, &[])], &services);

        // The policy names the backend's pod, and the packets the Service.
        for (backend, name, other) in [(ips[1], "b", "far"), (ips[2], "far", "b")] {
            for masquerade in [false, true] {
                dnat(backend, masquerade);
                enforcer.apply(&of(&[name])).unwrap();
                let what = format!("{mode:?}, backend {name}, masquerade {masquerade}");
                assert!(reaches(&a, vip, PORT, PATIENCE), "{what}");
                let names = of(&[other]);
                enforcer.apply(&names).unwrap();
                drain(&enforcer, &names);
                assert!(!reaches(&a, vip, PORT, SILENCE), "{what}, not allowed");
                let event = drain(&enforcer, &names).into_iter().find(|event| event.reason == "default_deny");
                let event = event.unwrap_or_else(|| panic!("{what}: nobody was told"));
                assert_eq!(event.destination.to_string(), backend, "the final destination is named");
                assert_eq!(event.pod.as_ref().map(|pod| pod.name.as_str()), Some("a"), "{what}");
            }
        }
        // Without a policy on egress nothing is judged twice.
        dnat(ips[2], false);
        enforcer.apply(&compiled(&[&a, &b], &remote, vec![], &services)).unwrap();
        assert!(reaches(&a, vip, PORT, PATIENCE));
        // Without the guard at every way out, a Service is what its own address says.
        enforcer.apply(&of(&["far"]).without_services()).unwrap();
        assert!(!reaches(&a, vip, PORT, SILENCE));
        // The direct way is judged as ever.
        enforcer.apply(&of(&["far"])).unwrap();
        assert!(a.reaches(&far, PORT));
        assert!(a.is_cut_off(&b, PORT));
    });
}

#[test]
fn policy_on_the_backend_decides_over_tcx() {
    backends_decide(AttachMode::Tcx, VIP, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
}

#[test]
fn policy_on_the_backend_decides_over_clsact() {
    backends_decide(AttachMode::Clsact, VIP, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
}

#[test]
fn policy_on_the_backend_decides_over_ipv6() {
    backends_decide(AttachMode::Auto, "fd00:96::1", ["fd00:1::1", "fd00:1::2", "fd00:2::1"]);
}

#[test]
fn an_open_connection_ends_with_its_permission() {
    on_a_host(|host| {
        let (mut enforcer, a, b, far) = open(host, AttachMode::Auto, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
        let of = |apps: &[&str]| {
            let policies = vec![egress("a", apps, &[])];
            compiled(&[&a, &b], &[("far", far.ips[0])], policies, &[service(VIP, None)])
        };
        dnat("10.2.0.1", false);
        enforcer.apply(&of(&["far"])).unwrap();
        let vip = SocketAddr::new(VIP.parse().unwrap(), PORT);
        let mut stream = a.run(move || TcpStream::connect_timeout(&vip, PATIENCE).unwrap());
        assert!(common::ping_stream(&mut stream, PATIENCE));
        enforcer.apply(&of(&["b"])).unwrap();
        assert!(!common::ping_stream(&mut stream, SILENCE));
        enforcer.apply(&of(&["far", "b"])).unwrap();
        assert!(reaches(&a, VIP, PORT, PATIENCE));
    });
}

#[test]
fn a_service_of_the_hosts_own_processes_is_judged_at_their_sockets() {
    on_a_host(|host| {
        let (mut enforcer, a, b, _far) = open(host, AttachMode::Auto, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
        ip("addr add 192.0.2.1/32 dev lo");
        let listener = TcpListener::bind("192.0.2.1:8080").unwrap();
        let socket = UdpSocket::bind("192.0.2.1:8080").unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || common::echo(stream));
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
        dnat("192.0.2.1", false);
        let udp = |patience: Duration| {
            a.run(move || {
                let socket = UdpSocket::bind("10.1.0.1:0").unwrap();
                socket.set_read_timeout(Some(patience)).unwrap();
                socket.send_to(b"x", (VIP, PORT)).unwrap();
                match socket.recv(&mut [0; 8]) {
                    Ok(_) => true,
                    Err(error) => {
                        assert_ne!(error.kind(), std::io::ErrorKind::ConnectionRefused);
                        false
                    }
                }
            })
        };
        let of =
            |blocks: &[&str]| compiled(&[&a, &b], &[], vec![egress("a", &[], blocks)], &[service(VIP, None)]);
        enforcer.apply(&of(&["192.0.2.1/32"])).unwrap();
        assert!(reaches(&a, VIP, PORT, PATIENCE));
        assert!(udp(PATIENCE));
        // `reaches` panics at a reset: what the host's stack answers is kept from the pod.
        let names = of(&["192.0.2.2/32"]);
        enforcer.apply(&names).unwrap();
        assert!(!reaches(&a, VIP, PORT, SILENCE));
        assert!(!udp(SILENCE));
        let told = drain(&enforcer, &names);
        assert!(told.iter().any(|event| event.destination.to_string() == "192.0.2.1"), "{told:?}");
        // A pod's own service answers the host, whatever the pod may open.
        let host = UdpSocket::bind("192.0.2.1:0").unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host.send_to(b"x", ("10.1.0.1", PORT)).unwrap();
        host.recv(&mut [0; 8]).unwrap();
    });
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    on_a_host(|host| {
        let (mut enforcer, a, b, _far) = open(host, AttachMode::Auto, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
        ip("addr add 169.254.1.1/32 dev mgya");
        dnat("10.1.0.1", true);
        let closed = NetworkPolicy { ingress: Some(vec![]), ..egress("a", &[], &[]) };
        let services = [service(VIP, None)];
        enforcer.apply(&compiled(&[&a, &b], &[], vec![closed], &services)).unwrap();
        assert!(reaches(&a, VIP, PORT, PATIENCE));
        assert!(a.is_cut_off(&b, PORT), "that opens nothing else");
    });
}

#[test]
fn node_ports_are_services_and_other_ports_of_the_node_are_not() {
    on_a_host(|host| {
        let (mut enforcer, a, b, far) = open(host, AttachMode::Auto, ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
        ip("addr add 192.0.2.1/32 dev lo");
        let listener = TcpListener::bind("192.0.2.1:9090").unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || common::echo(stream));
            }
        });
        dnat("10.2.0.1", true);
        let of = |apps: &[&str], blocks: &[&str]| {
            let policies = vec![egress("a", apps, blocks)];
            compiled(&[&a, &b], &[("far", far.ips[0])], policies, &[service("192.0.2.1", Some(30080))])
        };
        enforcer.apply(&of(&["far"], &[])).unwrap();
        assert!(reaches(&a, "192.0.2.1", 30080, PATIENCE));
        assert!(!reaches(&a, "192.0.2.1", 9090, SILENCE));
        enforcer.apply(&of(&[], &["192.0.2.1/32"])).unwrap();
        assert!(!reaches(&a, "192.0.2.1", 30080, SILENCE), "the node's address is not the backend's");
        assert!(reaches(&a, "192.0.2.1", 9090, PATIENCE));
    });
}

/// A pod at device 7 that may reach 10.2.0.1 only, and a Service, on the host's verdict.
fn simulated() -> Simulation {
    let own =
        model::Pod { namespace: "shop".into(), name: "a".into(), labels: labels("a"), ..Default::default() };
    let endpoint = model::LocalEndpoint {
        ifindex: 7,
        ifname: "mgya".into(),
        pod: Some(own.reference()),
        ips: vec!["10.1.0.1".parse().unwrap()],
    };
    let view = ClusterView {
        pods: vec![own.into()],
        policies: vec![egress("a", &[], &["10.2.0.1/32"])],
        services: [service(VIP, None)].into(),
        ..ClusterView::default()
    };
    Simulation::new(compile(&view, &[endpoint], &Ranges::default()))
}

fn udp(to: &str) -> Spec {
    Spec::new("10.1.0.1".parse().unwrap(), to.parse().unwrap(), 17, (4000, 53))
}

#[test]
fn every_packet_to_a_service_is_pending_and_no_other_is() {
    let world = simulated();
    let out = Hook { ifindex: 7, direction: direction::EGRESS, input: 7 };
    for (to, first, then) in [
        (VIP, (Reason::Service, true), (Reason::Established, true)),
        ("10.2.0.1", (Reason::Rule, false), (Reason::Established, false)),
        ("10.2.0.2", (Reason::DefaultDeny, false), (Reason::DefaultDeny, false)),
    ] {
        for expected in [first, then] {
            let verdict = world.judge(out, &udp(to).frame());
            assert_eq!((verdict.reason, verdict.pending), expected, "{to}");
        }
    }
    // Ping goes to no Service.
    let ping = Spec { protocol: 1, ..udp(VIP) };
    assert_eq!(world.judge(out, &ping.frame()).reason, Reason::DefaultDeny);
}

#[test]
fn where_it_leaves_the_final_destination_counts() {
    let world = simulated();
    assert_eq!(world.judge_exit(7, &udp("10.2.0.1").frame()).reason, Reason::Rule);
    assert_eq!(world.judge_exit(7, &udp("10.2.0.1").frame()).reason, Reason::Established);
    assert_eq!(world.judge_exit(7, &udp("10.2.0.2").frame()).reason, Reason::DefaultDeny);
    // Masqueraded, the device tells whose it is; behind a bridge, the source does; else nothing does.
    let masqueraded = Spec { source: "192.0.2.1".parse().unwrap(), ..udp("10.2.0.2") };
    assert_eq!(world.judge_exit(7, &masqueraded.frame()).reason, Reason::DefaultDeny);
    assert_eq!(world.judge_exit(3, &udp("10.2.0.2").frame()).reason, Reason::DefaultDeny);
    assert_eq!(world.judge_exit(3, &masqueraded.frame()).reason, Reason::Unattributed);
}

#[test]
fn a_service_that_nobody_sent_on_is_judged_by_its_own_address() {
    let world = simulated();
    let out = Hook { ifindex: 7, direction: direction::EGRESS, input: 7 };
    assert_eq!(world.judge(out, &udp(VIP).frame()).reason, Reason::Service);
    assert_eq!(world.judge_exit(7, &udp(VIP).frame()).reason, Reason::DefaultDeny);
    assert_eq!(world.judge(out, &udp(VIP).frame()).reason, Reason::Established, "at the pod it still is one");
}

#[test]
fn fragments_to_a_service_are_judged_with_their_first() {
    let world = simulated();
    let out = Hook { ifindex: 7, direction: direction::EGRESS, input: 7 };
    let part = |to: &str, offset, more| Spec { fragment: Some((9, offset, more)), ..udp(to) }.frame();
    let verdict = |frame: &[u8]| {
        let verdict = world.judge(out, frame);
        (verdict.reason, verdict.pending)
    };
    assert_eq!(verdict(&part(VIP, 100, false)), (Reason::OrphanFragment, false));
    assert_eq!(verdict(&part(VIP, 0, true)), (Reason::Service, true));
    assert_eq!(verdict(&part(VIP, 100, false)), (Reason::Fragment, true));
    assert_eq!(verdict(&part("10.2.0.1", 0, true)), (Reason::Rule, false));
    assert_eq!(verdict(&part("10.2.0.1", 100, false)), (Reason::Fragment, false));
    assert_eq!(world.judge_exit(7, &part("10.2.0.2", 100, false)).reason, Reason::OrphanFragment);
    assert_eq!(world.judge_exit(7, &part("10.2.0.2", 0, true)).reason, Reason::DefaultDeny);
    assert_eq!(world.judge_exit(7, &part("10.2.0.2", 100, false)).reason, Reason::OrphanFragment);
}

#[test]
fn sockets_of_the_host_are_judged_for_pods_only() {
    let world = simulated();
    assert_eq!(world.judge_host(&udp("10.2.0.1").frame()).unwrap().reason, Reason::Rule);
    assert_eq!(world.judge_host(&udp("192.0.2.1").frame()).unwrap().reason, Reason::DefaultDeny);
    let stranger = Spec { source: "198.51.100.1".parse().unwrap(), ..udp("192.0.2.1") };
    assert_eq!(world.judge_host(&stranger.frame()), None);
    // The error that the host's stack answers with, and only that, is kept from the pod; and not for ever.
    let inward = Hook { ifindex: 7, direction: direction::INGRESS, input: 0 };
    let quote = udp(VIP).ip();
    let error = Spec {
        icmp: (3, 3),
        payload: quote,
        ..Spec::new(VIP.parse().unwrap(), "10.1.0.1".parse().unwrap(), 1, (0, 0))
    };
    assert_eq!(world.judge(inward, &error.frame()).reason, Reason::Refusal);
    world.now.set(3_000_000_000);
    assert_eq!(world.judge(inward, &error.frame()).reason, Reason::LocalNode);
}
