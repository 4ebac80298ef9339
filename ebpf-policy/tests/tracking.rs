//! Connection tracking, packet by packet, on the host's verdict (the kernel's agrees: see agreement.rs).

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::IpAddr;

use common::packet::Spec;
use ebpf_policy::model::{ClusterView, LocalEndpoint, NetworkPolicy, Peer, Pod, Ranges, Rule};
use ebpf_policy::reference::Flow;
use ebpf_policy::simulate::Simulation;
use ebpf_policy::{Compiled, Hook, Reason, compile, direction, model::Direction};

const IFINDEX: u32 = 7;
const ELSEWHERE: u32 = 3;
const SECOND: u64 = 1_000_000_000;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn pod() -> IpAddr {
    "10.0.0.1".parse().unwrap()
}

fn peer() -> IpAddr {
    "10.0.0.2".parse().unwrap()
}

/// One pod that may be reached by, and may reach, the given blocks.
fn compiled(ingress: &[&str], egress: &[&str]) -> Compiled {
    let rules = |blocks: &[&str]| {
        let peers = blocks.iter().map(|block| Peer::IpBlock { cidr: block.parse().unwrap(), except: vec![] });
        peers.map(|peer| Rule { peers: vec![peer], ..Rule::default() }).collect()
    };
    let policy = NetworkPolicy {
        namespace: "x".into(),
        name: "p".into(),
        ingress: Some(rules(ingress)),
        egress: Some(rules(egress)),
        ..NetworkPolicy::default()
    };
    let own = Pod { namespace: "x".into(), name: "a".into(), ..Pod::default() };
    let endpoint = LocalEndpoint {
        ifindex: IFINDEX,
        ifname: "mgya".into(),
        pod: Some(own.reference()),
        ips: vec![pod(), "fd00::1".parse().unwrap()],
    };
    let view = ClusterView { pods: vec![own.into()], policies: vec![policy], ..ClusterView::default() };
    compile(&view, &[endpoint], &Ranges::default())
}

fn hook(direction: u8) -> Hook {
    Hook { ifindex: IFINDEX, direction, input: ELSEWHERE }
}

fn sends(world: &Simulation, spec: &Spec) -> Reason {
    world.judge(hook(direction::EGRESS), &spec.frame()).reason
}

fn gets(world: &Simulation, spec: &Spec) -> Reason {
    world.judge(hook(direction::INGRESS), &spec.frame()).reason
}

fn tcp(to_pod: bool, flags: u8) -> Spec {
    let mut spec = if to_pod {
        Spec::new(peer(), pod(), 6, (80, 4000))
    } else {
        Spec::new(pod(), peer(), 6, (4000, 80))
    };
    spec.flags = flags;
    spec
}

fn udp(to_pod: bool) -> Spec {
    if to_pod { Spec::new(peer(), pod(), 17, (53, 4000)) } else { Spec::new(pod(), peer(), 17, (4000, 53)) }
}

fn echo(to_pod: bool, icmp: (u8, u8)) -> Spec {
    let (from, to) = if to_pod { (peer(), pod()) } else { (pod(), peer()) };
    Spec { icmp, ..Spec::new(from, to, 1, (77, 0)) }
}

const ANY: &[&str] = &["0.0.0.0/0"];
const NONE: &[&str] = &[];

#[test]
fn replies_need_no_rule() {
    let world = Simulation::new(compiled(NONE, ANY));
    assert_eq!(gets(&world, &tcp(true, SYN | ACK)), Reason::DefaultDeny);
    assert_eq!(sends(&world, &tcp(false, SYN)), Reason::Rule);
    assert_eq!(gets(&world, &tcp(true, SYN | ACK)), Reason::Established);
    assert_eq!(sends(&world, &tcp(false, ACK)), Reason::Established);
    assert_eq!(sends(&world, &udp(false)), Reason::Rule);
    assert_eq!(gets(&world, &udp(true)), Reason::Established);
}

#[test]
fn a_syn_in_the_reply_direction_is_a_new_connection() {
    let world = Simulation::new(compiled(NONE, ANY));
    sends(&world, &tcp(false, SYN));
    gets(&world, &tcp(true, SYN | ACK));
    assert_eq!(gets(&world, &tcp(true, SYN)), Reason::DefaultDeny);
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::Established, "the connection itself goes on");
}

#[test]
fn an_sctp_init_in_the_reply_direction_is_a_new_association() {
    let world = Simulation::new(compiled(NONE, ANY));
    let mut out = Spec::new(pod(), peer(), 132, (4000, 80));
    let mut back = Spec::new(peer(), pod(), 132, (80, 4000));
    out.flags = 1;
    back.flags = 2;
    assert_eq!(sends(&world, &out), Reason::Rule);
    assert_eq!(gets(&world, &back), Reason::Established);
    back.flags = 1;
    assert_eq!(gets(&world, &back), Reason::DefaultDeny);
}

#[test]
fn echo_requests_are_judged_and_echo_replies_follow_them() {
    let world = Simulation::new(compiled(NONE, ANY));
    assert_eq!(gets(&world, &echo(true, (0, 0))), Reason::DefaultDeny);
    assert_eq!(sends(&world, &echo(false, (8, 0))), Reason::Rule);
    assert_eq!(gets(&world, &echo(true, (0, 0))), Reason::Established);
    assert_eq!(
        gets(&world, &echo(true, (8, 0))),
        Reason::DefaultDeny,
        "the same identifier, asked from outside"
    );
}

#[test]
fn a_connection_ends_some_time_after_its_last_packet() {
    let world = Simulation::new(compiled(NONE, ANY));
    let later = |seconds: u64| world.now.set(world.now.get() + seconds * SECOND);
    sends(&world, &udp(false));
    later(29);
    assert_eq!(gets(&world, &udp(true)), Reason::Established);
    later(179);
    assert_eq!(gets(&world, &udp(true)), Reason::Established, "answered, it lives longer");
    later(181);
    assert_eq!(gets(&world, &udp(true)), Reason::DefaultDeny);

    sends(&world, &tcp(false, SYN));
    gets(&world, &tcp(true, SYN | ACK));
    later(12 * 3600);
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::Established);
    sends(&world, &tcp(false, FIN | ACK));
    later(11);
    assert_eq!(gets(&world, &tcp(true, FIN | ACK)), Reason::Established, "half closed");
    later(11);
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::DefaultDeny, "closed by both");

    sends(&world, &tcp(false, SYN));
    gets(&world, &tcp(true, RST | ACK));
    later(11);
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::DefaultDeny, "reset");
}

#[test]
fn a_connection_that_policy_ended_stays_ended_for_both_sides() {
    let mut world = Simulation::new(compiled(ANY, ANY));
    sends(&world, &tcp(false, SYN));
    gets(&world, &tcp(true, SYN | ACK));
    sends(&world, &udp(false));
    // Egress goes, ingress stays open: the far side must not revive as its own what the pod had opened.
    world.apply(compiled(ANY, NONE));
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::Cut);
    assert_eq!(gets(&world, &tcp(true, ACK)), Reason::Cut);
    assert_eq!(sends(&world, &tcp(false, ACK)), Reason::DefaultDeny);
    assert_eq!(gets(&world, &udp(true)), Reason::Cut);
    assert_eq!(sends(&world, &udp(false)), Reason::DefaultDeny);
    // A real new connection from there is another matter.
    assert_eq!(gets(&world, &tcp(true, SYN)), Reason::Rule);
    assert_eq!(sends(&world, &tcp(false, SYN | ACK)), Reason::Established);

    // And what policy allows again goes on.
    world.apply(compiled(ANY, ANY));
    assert_eq!(gets(&world, &udp(true)), Reason::Established);
}

#[test]
fn an_icmp_error_passes_only_about_a_live_connection() {
    let mut world = Simulation::new(compiled(NONE, ANY));
    let router: IpAddr = "192.0.2.9".parse().unwrap();
    let about = |quoted: &Spec| {
        let mut error = Spec::new(router, pod(), 1, (0, 0));
        error.icmp = (3, 4);
        error.payload = quoted.ip().get(..28).unwrap().to_vec();
        error
    };
    assert_eq!(gets(&world, &about(&tcp(false, ACK))), Reason::DefaultDeny);
    sends(&world, &tcp(false, SYN));
    assert_eq!(gets(&world, &about(&tcp(false, ACK))), Reason::Related);
    assert_eq!(
        gets(&world, &about(&tcp(true, ACK))),
        Reason::DefaultDeny,
        "it quotes what the pod never sent"
    );
    let mut other = tcp(false, ACK);
    other.ports.1 = 81;
    assert_eq!(gets(&world, &about(&other)), Reason::DefaultDeny);
    world.apply(compiled(NONE, NONE));
    assert_eq!(gets(&world, &about(&tcp(false, ACK))), Reason::DefaultDeny);
}

#[test]
fn later_fragments_follow_the_first_and_only_for_a_while() {
    let world = Simulation::new(compiled(NONE, ANY));
    let fragment = |offset, more| Spec { fragment: Some((9, offset, more)), ..udp(false) };
    assert_eq!(sends(&world, &fragment(185, false)), Reason::OrphanFragment);
    assert_eq!(sends(&world, &fragment(0, true)), Reason::Rule);
    assert_eq!(sends(&world, &fragment(185, false)), Reason::Fragment);
    world.now.set(31 * SECOND);
    assert_eq!(sends(&world, &fragment(185, false)), Reason::OrphanFragment);
    let tiny = Spec { fragment: Some((9, 1, false)), ..tcp(false, ACK) };
    assert_eq!(sends(&world, &tiny), Reason::Malformed, "it would rewrite TCP flags");
}

#[test]
fn neighbour_discovery_passes_even_when_closed_but_not_from_afar() {
    let closed = Simulation::new(Compiled::default());
    let (ours, theirs): (IpAddr, IpAddr) = ("fe80::1".parse().unwrap(), "ff02::1:ff00:1".parse().unwrap());
    for kind in 133..=137 {
        let near = Spec { icmp: (kind, 0), hop_limit: 255, ..Spec::new(ours, theirs, 58, (0, 0)) };
        assert_eq!(sends(&closed, &near), Reason::Neighbour);
        assert_eq!(gets(&closed, &near), Reason::Neighbour);
        assert_eq!(sends(&closed, &Spec { hop_limit: 254, ..near }), Reason::UnknownEndpoint);
    }
    let mut arp = vec![0xff; 12];
    arp.extend([0x08, 0x06]);
    arp.extend([0; 28]);
    assert_eq!(closed.judge(hook(direction::EGRESS), &arp).reason, Reason::Neighbour);
    let mut vlan = arp.clone();
    vlan.splice(12..14, [0x81, 0x00]);
    assert_eq!(closed.judge(hook(direction::EGRESS), &vlan).reason, Reason::NotIp);
}

#[test]
fn a_pod_sends_only_from_its_own_addresses() {
    let world = Simulation::new(compiled(ANY, ANY));
    let forged = Spec { source: "10.0.0.3".parse().unwrap(), ..udp(false) };
    assert_eq!(sends(&world, &forged), Reason::Spoofed);
    let link_local = Spec::new("fe80::5".parse().unwrap(), "ff02::16".parse().unwrap(), 58, (0, 0));
    assert_eq!(sends(&world, &Spec { icmp: (143, 0), ..link_local }), Reason::LinkLocal);
    // Not even as an answer: what comes for another address makes no connection of the pod's.
    let strange = Spec { destination: "10.0.0.3".parse().unwrap(), ..udp(true) };
    assert_eq!(gets(&world, &strange), Reason::Rule);
    assert_eq!(sends(&world, &Spec { source: "10.0.0.3".parse().unwrap(), ..udp(false) }), Reason::Spoofed);
}

#[test]
fn the_node_and_the_pod_itself_are_told_by_where_packets_come_from() {
    let world = Simulation::new(compiled(NONE, NONE));
    let frame = tcp(true, SYN).frame();
    let at = |input| world.judge(Hook { input, ..hook(direction::INGRESS) }, &frame).reason;
    assert_eq!(at(ELSEWHERE), Reason::DefaultDeny);
    assert_eq!(at(0), Reason::LocalNode);
    assert_eq!(at(IFINDEX), Reason::Hairpin);
    assert_eq!(sends(&world, &tcp(false, SYN | ACK)), Reason::Established, "the answer to the node");
    let to_itself = Spec { destination: pod(), ..tcp(false, SYN) };
    assert_eq!(sends(&world, &to_itself), Reason::Hairpin);
    // Forged from outside it is a packet like any other.
    assert_eq!(gets(&world, &Spec { source: pod(), ..tcp(true, SYN) }), Reason::DefaultDeny);
}

#[test]
fn a_block_of_ipv6_says_nothing_of_ipv4() {
    let compiled = compiled(&["::/0"], &["0.0.0.0/0"]);
    let flow =
        |direction, remote: &str| Flow { direction, remote: remote.parse().unwrap(), protocol: 6, port: 80 };
    let open = |direction, remote| compiled.explain(IFINDEX, &flow(direction, remote)).allows();
    assert!(open(Direction::Ingress, "2001:db8::1"));
    assert!(!open(Direction::Ingress, "192.0.2.1"));
    assert!(open(Direction::Egress, "192.0.2.1"));
    assert!(!open(Direction::Egress, "2001:db8::1"));
}

#[test]
fn a_packet_cut_short_is_dropped_at_every_length() {
    let world = Simulation::new(compiled(ANY, ANY));
    for spec in [
        tcp(false, SYN),
        udp(false),
        echo(false, (8, 0)),
        Spec {
            extensions: 3,
            ..Spec::new("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), 6, (1, 2))
        },
    ] {
        let frame = spec.frame();
        // Only what is needed has to be there: ports, and for TCP the flags.
        let needed = frame.len()
            - match spec.protocol {
                6 => 6,
                17 => 4,
                _ => 0,
            };
        for length in 0..needed {
            let reason = world.judge(hook(direction::EGRESS), frame.get(..length).unwrap()).reason;
            assert_eq!(reason, Reason::Malformed, "{spec:?} at {length}");
        }
    }
}
