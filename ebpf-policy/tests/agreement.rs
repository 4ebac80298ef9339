//! Everything that can judge agrees: the reference evaluator, compiled state, the host's verdict on packets, and the programs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::mpsc::channel;

use common::cluster::{any_address, cluster, local, policies, port_number};
use common::on_a_host;
use common::packet::Spec;
use ebpf_policy::model::{ClusterView, Direction, LocalEndpoint, PodRef, Ranges, ServiceAddress};
use ebpf_policy::reference::{Answer, Flow, evaluate};
use ebpf_policy::simulate::Simulation;
use ebpf_policy::{Counter, Enforcer, Hook, Options, Reason, compile, direction};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const PROTOCOLS: [u8; 5] = [1, 6, 17, 47, 132];

fn hook(ifindex: u32, way: Direction, input: u32) -> Hook {
    let direction = if way == Direction::Ingress { direction::INGRESS } else { direction::EGRESS };
    Hook { ifindex, direction, input }
}

/// The first packet of a connection between an endpoint and a remote address.
fn opening(endpoint: &LocalEndpoint, flow: &Flow) -> Option<Spec> {
    let own = *endpoint.ips.iter().find(|ip| ip.is_ipv4() == flow.remote.is_ipv4())?;
    let (source, destination) = match flow.direction {
        Direction::Ingress => (flow.remote, own),
        Direction::Egress => (own, flow.remote),
    };
    let mut spec = Spec::new(source, destination, flow.protocol, (40_000, flow.port));
    spec.flags = if flow.protocol == 6 { 2 } else { 1 };
    Some(spec)
}

fn flows() -> impl Strategy<Value = Flow> {
    (any::<bool>(), any_address(), select(PROTOCOLS.to_vec()), port_number()).prop_map(
        |(ingress, remote, protocol, port)| Flow {
            direction: if ingress { Direction::Ingress } else { Direction::Egress },
            remote,
            protocol,
            port,
        },
    )
}

proptest! {
    #![proptest_config(Config { cases: 4000, ..Config::default() })]

    #[test]
    fn reference_compiled_state_and_host_verdict_agree(view in cluster(), flows in vec(flows(), 1..24)) {
        let local = local(&view, [11, 12]);
        let seen = view.with_local(&local);
        let compiled = compile(&view, &local, &Ranges::default());
        for (endpoint, flow) in local.iter().flat_map(|e| flows.iter().map(move |flow| (e, flow))) {
            let pod = endpoint.pod.clone().unwrap_or(PodRef { namespace: String::new(), name: String::new() });
            let expected = evaluate(&seen, &pod, flow);
            prop_assert_eq!(&compiled.explain(endpoint.ifindex, flow), &expected, "{:?}", flow);

            let Some(spec) = opening(endpoint, flow) else { continue };
            if endpoint.ips.contains(&flow.remote) {
                continue;
            }
            let mut frame = spec.frame();
            if flow.protocol == 1 {
                // Neither echo nor error: judged packet by packet.
                let icmp = Spec { icmp: (13, 0), protocol: if flow.remote.is_ipv6() { 58 } else { 1 }, ..spec };
                frame = icmp.frame();
            }
            let verdict = Simulation::new(compiled.clone()).judge(hook(endpoint.ifindex, flow.direction, 99), &frame);
            // Nothing in NetworkPolicy names ICMP: its number and its types make no difference.
            prop_assert_eq!(verdict.reason.allows(), expected.allows(), "{:?} {:?}", flow, verdict);
            match expected {
                Answer::Closed => prop_assert_eq!(verdict.reason, Reason::Closed),
                Answer::NotIsolated => prop_assert_eq!(verdict.reason, Reason::NotIsolated),
                Answer::Allowed(_) => prop_assert_eq!(verdict.reason, Reason::Rule),
                Answer::Denied(_) => prop_assert_eq!(verdict.reason, Reason::DefaultDeny),
            }
        }
    }

    #[test]
    fn ids_do_not_depend_on_the_order_of_anything(view in cluster()) {
        let local = local(&view, [11, 12]);
        let mut shuffled = view.clone();
        shuffled.policies.reverse();
        let pods = shuffled.pods.len();
        shuffled.pods[pods.min(2)..].reverse();
        prop_assert_eq!(
            compile(&view, &local, &Ranges::default()),
            compile(&shuffled, &local, &Ranges::default())
        );
    }
}

/// One step of a run that simulation and kernel go through together.
#[derive(Debug, Clone)]
enum Step {
    Packet { endpoint: usize, to_pod: bool, input: Input, spec: Spec, quotes: bool },
    Raw { endpoint: usize, to_pod: bool, bytes: Vec<u8> },
    Policies(usize),
}

#[derive(Debug, Clone, Copy)]
enum Input {
    Node,
    Own,
    Elsewhere,
}

fn spec() -> impl Strategy<Value = Spec> {
    let fragment = prop_oneof![
        6 => Just(None),
        1 => (0u16..2, select(vec![0u16, 1, 185]), any::<bool>()).prop_map(Some),
    ];
    let shape = (fragment, 0u8..4, select(vec![64u8, 255]));
    let transport = (
        select(vec![1u8, 6, 6, 6, 17, 17, 58, 132, 47]),
        select(vec![0u8, 1, 2, 4, 6, 16, 17, 18, 20]),
        select(vec![
            (8u8, 0u8),
            (0, 0),
            (3, 4),
            (11, 0),
            (128, 0),
            (129, 0),
            (1, 4),
            (2, 0),
            (3, 0),
            (13, 0),
            (135, 0),
            (136, 0),
        ]),
    );
    (any::<bool>(), 0u8..8, 0u8..8, select(vec![80u16, 81]), select(vec![80u16, 4000]), shape, transport)
        .prop_map(
            |(
                v6,
                from,
                to,
                source_port,
                destination_port,
                (fragment, extensions, hop_limit),
                (protocol, flags, icmp),
            )| {
                use common::cluster::address;
                let mut spec =
                    Spec::new(address(v6, from), address(v6, to), protocol, (source_port, destination_port));
                spec.fragment = fragment;
                spec.extensions = extensions;
                spec.hop_limit = hop_limit;
                spec.flags = flags;
                spec.icmp = icmp;
                spec
            },
        )
}

fn step() -> impl Strategy<Value = Step> {
    let input = select(vec![Input::Node, Input::Own, Input::Elsewhere, Input::Elsewhere, Input::Elsewhere]);
    prop_oneof![
        20 => (0usize..2, any::<bool>(), input, spec(), any::<bool>())
            .prop_map(|(endpoint, to_pod, input, spec, quotes)| Step::Packet { endpoint, to_pod, input, spec, quotes }),
        1 => (0usize..2, any::<bool>(), vec(any::<u8>(), 46..90))
            .prop_map(|(endpoint, to_pod, bytes)| Step::Raw { endpoint, to_pod, bytes }),
        1 => (0usize..3).prop_map(Step::Policies),
    ]
}

/// Makes half of the packets belong to flows that exist: from or to the endpoint, in answer to an earlier packet.
fn aim(spec: &mut Spec, endpoint: &LocalEndpoint, to_pod: bool, earlier: &[Spec], quotes: bool) {
    let v6 = spec.source.is_ipv6();
    let own = endpoint.ips[usize::from(v6)];
    if to_pod {
        spec.destination = own;
    } else if spec.source != common::cluster::address(v6, 7) {
        spec.source = own;
    }
    if let Some(quoted) =
        earlier.iter().rev().find(|e| e.source == spec.destination || e.destination == spec.source)
        && quotes
    {
        spec.payload = quoted.ip();
        if !matches!(spec.protocol, 1 | 58) {
            spec.payload.clear();
            spec.protocol = quoted.protocol;
            spec.ports = (quoted.ports.1, quoted.ports.0);
        } else {
            spec.protocol = if v6 { 58 } else { 1 };
        }
    }
}

/// What the other side would send back.
fn answer(endpoint: usize, to_pod: bool, spec: &Spec) -> Step {
    let back = Spec {
        source: spec.destination,
        destination: spec.source,
        ports: (spec.ports.1, spec.ports.0),
        flags: if spec.protocol == 6 { 16 } else { 3 },
        fragment: None,
        payload: vec![],
        ..spec.clone()
    };
    Step::Raw { endpoint, to_pod: !to_pod, bytes: back.frame() }
}

#[test]
fn the_kernel_judges_every_packet_as_the_host_does() {
    compare_with_the_kernel(TestRunner::new(config(24)));
}

#[test]
fn the_kernel_judges_as_the_host_does_for_every_reason_there_is() {
    // The same packets every time, so that it is known what happens among them.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let seen = compare_with_the_kernel(TestRunner::new_with_rng(config(40), rng));
    // Agreement on what never happened would say nothing.
    let missing: Vec<_> = Reason::ALL
        .iter()
        .filter(|reason| {
            use Reason::{
                DenyRule, LinkLocal, Refusal, Tunnel, TunnelOwnSource, TunnelUnknownSource, Unattributed,
                UnknownEndpoint,
            };
            !matches!(
                reason,
                // The last two need real packets: see services.rs.
                DenyRule
                    | LinkLocal
                    | Tunnel
                    | TunnelOwnSource
                    | TunnelUnknownSource
                    | UnknownEndpoint
                    | Unattributed
                    | Refusal
            )
        })
        .filter(|reason| !seen.contains(reason.name()))
        .collect();
    assert!(missing.is_empty(), "never happened: {missing:?}");
}

fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, ..Config::default() }
}

/// Goes through random runs with simulation and kernel side by side; returns the reasons that came up.
fn compare_with_the_kernel(mut runner: TestRunner) -> BTreeSet<&'static str> {
    let (reasons, result) = channel();
    on_a_host(move |host| {
        let (a, b) = (host.pod("a", &[]), host.pod("b", &[]));
        let devices = [a.ifindex, b.ifindex];
        let seen = RefCell::new(BTreeSet::new());
        let runs = (cluster(), policies(), policies(), vec(step(), 1..60));
        let result = runner.run(&runs, |(view, second, third, steps)| {
            Enforcer::cleanup(&host.pin_dir()).unwrap();
            let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
            let services =
                [false, true].map(|v6| ServiceAddress { ip: common::cluster::address(v6, 6), port: None });
            let views: Vec<ClusterView> = [view.policies.clone(), second, third]
                .into_iter()
                .map(|policies| ClusterView { policies, services: services.into(), ..view.clone() })
                .collect();
            let local = local(&view, devices);
            let compiled = |n: usize| compile(&views[n], &local, &Ranges::default());
            let mut simulation = Simulation::new(compiled(0));
            enforcer.apply(&compiled(0)).unwrap();
            let mut earlier = Vec::new();
            let mut counters: Vec<Counter> = Vec::new();
            let mut steps: VecDeque<Step> = steps.into();
            let mut answers = Vec::new();
            let mut rounds = [1, 2, 0].into_iter();
            for n in 0.. {
                // After all else, under each policy in turn, everything is answered: live connections meet every change.
                if steps.is_empty()
                    && let Some(round) = rounds.next()
                {
                    steps.push_back(Step::Policies(round));
                    steps.extend(answers.iter().cloned());
                }
                let Some(step) = steps.pop_front() else { break };
                let (endpoint, to_pod, input, frame) = match step {
                    Step::Policies(n) => {
                        simulation.apply(compiled(n));
                        enforcer.apply(&compiled(n)).unwrap();
                        continue;
                    }
                    Step::Packet { endpoint, to_pod, input, mut spec, quotes } => {
                        if let Some(endpoint) = local.get(endpoint) {
                            aim(&mut spec, endpoint, to_pod, &earlier, quotes);
                        }
                        answers.push(answer(endpoint, to_pod, &spec));
                        if let Some((id, 0, true)) = spec.fragment {
                            let last = Spec { fragment: Some((id, 185, false)), ..spec.clone() };
                            steps.push_front(Step::Raw { endpoint, to_pod, bytes: last.frame() });
                        }
                        earlier.push(spec.clone());
                        (endpoint, to_pod, input, spec.frame())
                    }
                    Step::Raw { endpoint, to_pod, bytes } => (endpoint, to_pod, Input::Elsewhere, bytes),
                };
                let ifindex = devices[endpoint];
                let input = match input {
                    Input::Node => 0,
                    Input::Own => ifindex,
                    Input::Elsewhere => 1,
                };
                let (program, way) = if to_pod {
                    ("pod_ingress", Direction::Ingress)
                } else {
                    ("pod_egress", Direction::Egress)
                };
                let expected = simulation.judge(hook(ifindex, way, input), &frame);
                let passed = enforcer.test_run(program, ifindex, input, &frame).unwrap();
                let after = enforcer.counters().unwrap();
                let counted = after.iter().find(|counter| !counters.contains(counter)).unwrap();
                seen.borrow_mut().insert(counted.reason);
                prop_assert_eq!(counted.reason, expected.reason.name(), "step {} {:02x?}", n, frame);
                prop_assert_eq!(passed, expected.reason.allows());
                counters = after;
                if to_pod || !passed {
                    continue;
                }
                // What was let go to a Service leaves for a backend; here, for the same address.
                let expected = simulation.judge_exit(ifindex, &frame).reason;
                let passed = enforcer.test_run("exit_ethernet", 1, ifindex, &frame).unwrap();
                // A test run cannot carry the mark of a Service: from a device that is no pod's, it is not looked at.
                let expected = if expected == Reason::Unattributed { Reason::NotIsolated } else { expected };
                prop_assert_eq!(passed, expected.allows(), "step {} leaves {:02x?}", n, frame);
                let after = enforcer.counters().unwrap();
                let counted = after.iter().find(|counter| !counters.contains(counter));
                // Let go a second time, it is not counted a second time.
                let denied = (!passed).then(|| expected.name());
                prop_assert_eq!(counted.map(|counter| counter.reason), denied, "step {}", n);
                counters = after;
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
        reasons.send(seen.into_inner()).unwrap();
    });
    result.recv().unwrap()
}

#[test]
fn out_of_the_tunnel_come_only_remote_nodes_addresses() {
    on_a_host(|host| {
        let mut enforcer = Enforcer::open(&Options::new(host.pin_dir())).unwrap();
        let ranges = Ranges {
            remote: ["10.0.0.0/16", "fd00::/48"].map(|net| net.parse().unwrap()).to_vec(),
            own: ["10.0.1.0/24", "fd00:0:0:1::/64"].map(|net| net.parse().unwrap()).to_vec(),
        };
        let compiled = compile(&ClusterView::default(), &[], &ranges);
        enforcer.apply(&compiled).unwrap();
        let simulation = Simulation::new(compiled);
        let cases = [
            ("10.0.2.1", "10.0.1.1", Reason::Tunnel),
            ("10.0.1.9", "10.0.1.1", Reason::TunnelOwnSource),
            ("192.0.2.1", "10.0.1.1", Reason::TunnelUnknownSource),
            ("fd00::1", "fd00:0:0:1::1", Reason::Tunnel),
            ("fd00:0:0:1::2", "fd00:0:0:1::1", Reason::TunnelOwnSource),
            ("fe80::1", "fd00:0:0:1::1", Reason::TunnelUnknownSource),
            ("::ffff:10.0.2.1", "fd00:0:0:1::1", Reason::Malformed),
        ];
        for (source, destination, reason) in cases {
            let (source, destination): (IpAddr, IpAddr) =
                (source.parse().unwrap(), destination.parse().unwrap());
            let packet = Spec::new(source, destination, 17, (1, 2)).ip();
            assert_eq!(simulation.judge_tunnel(&packet).reason, reason, "{source}");
            let passed = enforcer.test_run("tunnel_ingress", 1, 1, &packet).unwrap();
            assert_eq!(passed, reason.allows(), "{source}");
        }
    });
}
