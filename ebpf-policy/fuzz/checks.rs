//! What must hold for any bytes; shared by the fuzz target and the test that replays its corpus.

use ebpf_policy::model::{ClusterView, LocalEndpoint, Pod, Ranges};
use ebpf_policy::simulate::Simulation;
use ebpf_policy::{Hook, Reason, compile, direction};
use margay_bpf::layout::Addr;
use margay_bpf::parse::{self, Kind, Packet, Start};

/// Judges bytes as a packet from a pod, to a pod, and out of the tunnel.
pub fn packet(data: &[u8]) {
    let own = Pod { namespace: "x".into(), name: "a".into(), ..Pod::default() };
    let ips = vec!["10.0.0.1".parse().expect("IPv4"), "fd00::1".parse().expect("IPv6")];
    let endpoint = LocalEndpoint { ifindex: 7, ifname: "mgya".into(), pod: Some(own.reference()), ips };
    let view = ClusterView { pods: vec![own.into()], ..ClusterView::default() };
    let ranges = Ranges {
        remote: vec!["10.0.0.0/8".parse().expect("prefix"), "fd00::/8".parse().expect("prefix")],
        own: vec!["10.0.0.1/32".parse().expect("prefix")],
    };
    let world = Simulation::new(compile(&view, &[endpoint], &ranges));
    let ours = [Addr::v4([10, 0, 0, 1]), Addr::v6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])];

    let mut parsed = Packet::default();
    let understood = parse::packet(data, Start::Ethernet, &mut parsed).is_ok();
    let sent = world.judge(Hook { ifindex: 7, direction: direction::EGRESS, input: 9 }, data).reason;
    if sent.allows() {
        assert!(understood, "passed without being understood");
        assert!(parsed.kind == Kind::Neighbour || ours.contains(&parsed.source), "a forged source passed");
    }
    for input in [0, 7, 9] {
        let got = world.judge(Hook { ifindex: 7, direction: direction::INGRESS, input }, data).reason;
        assert!(understood || !got.allows(), "passed without being understood");
    }
    let mut inner = Packet::default();
    if world.judge_tunnel(data).reason == Reason::Tunnel {
        parse::addresses(data, &mut inner).expect("passed without being understood");
        assert!(!matches!(inner.source, Addr([0, ..]) if !inner.source.is_v4()), "no remote range has it");
        assert_ne!(inner.source, Addr::v4([10, 0, 0, 1]), "a source of ours came out of the tunnel");
    }
}
