//! What the scenarios share.
#![allow(dead_code, unreachable_pub)] // Each test binary uses its part.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use netns_tests::bins::Bins;
use netns_tests::lab::Lab;
use netns_tests::netns::Netns;
use netns_tests::probe::{self, Outcome, Probe};
use netns_tests::spec::{self, Protocol};

pub fn bins() -> Bins {
    Bins::beside(Path::new(env!("CARGO_BIN_EXE_mesh-lab"))).unwrap()
}

/// Two nodes, a pod on each, dual stack. `more` is appended to the lab file.
pub fn two(more: &str) -> spec::Lab {
    let text = format!(
        "
name: two
nodes:
  - {{name: a, ips: [192.0.2.1, '2001:db8::1'], podCIDRs: [10.244.1.0/24, 'fd00:10:244:1::/64']}}
  - {{name: b, ips: [192.0.2.2, '2001:db8::2'], podCIDRs: [10.244.2.0/24, 'fd00:10:244:2::/64']}}
pods:
  - {{namespace: d, name: pa, node: a, labels: {{app: a}}, ports: [{{name: web, port: 8080}}, {{port: 8080, protocol: UDP}}, {{port: 8080, protocol: SCTP}}]}}
  - {{namespace: d, name: pb, node: b, labels: {{app: b}}, ports: [{{name: web, port: 8080}}, {{port: 8080, protocol: UDP}}, {{port: 8080, protocol: SCTP}}]}}
{more}"
    );
    spec::Lab::parse(&text).unwrap()
}

/// A probe from pod to pod in the family of the first address that both have.
pub fn between(lab: &Lab, from: &str, to: &str, v6: bool, protocol: Protocol) -> Probe {
    let (from, to) = (lab.pod("d", from).unwrap(), lab.pod("d", to).unwrap());
    let pick = |ips: &[IpAddr]| *ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
    Probe {
        from: from.netns.clone(),
        src: pick(&from.ips),
        dst: pick(&to.ips),
        port: 8080,
        protocol,
        listener: format!("d/{}", to.spec.name),
    }
}

/// Both directions, both families, TCP and UDP.
pub fn all_between(lab: &Lab, a: &str, b: &str) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for v6 in [false, true] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                probes.push(between(lab, from, to, v6, protocol));
            }
        }
    }
    probes
}

/// All get through, within the probes' patience.
pub fn assert_reach(probes: &[Probe]) {
    let list: Vec<(Probe, bool)> = probes.iter().map(|probe| (probe.clone(), true)).collect();
    for (probe, outcome) in probes.iter().zip(probe::all(&list).unwrap()) {
        assert_eq!(outcome, Outcome::Allowed, "{} -> {} {}", probe.src, probe.listener, probe.protocol);
    }
}

/// None gets through: silence or a local refusal (an unreachable route), never an answer.
pub fn assert_cut(probes: &[Probe]) {
    let list: Vec<(Probe, bool)> = probes.iter().map(|probe| (probe.clone(), false)).collect();
    for (probe, outcome) in probes.iter().zip(probe::all(&list).unwrap()) {
        assert!(
            matches!(outcome, Outcome::Dropped | Outcome::Refused(_)),
            "{} -> {} {}: {outcome}",
            probe.src,
            probe.listener,
            probe.protocol
        );
    }
}

/// `ping` in a namespace: (sent, received), and the average round trip.
pub fn ping(netns: &Netns, to: IpAddr, count: u32, every: f64) -> (u32, u32, Duration) {
    let output = netns
        .command("ping")
        .args(["-n", "-q", "-c", &count.to_string(), "-i", &every.to_string(), "-W", "2", &to.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_ping(&text)
        .unwrap_or_else(|| panic!("ping {to}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

pub fn parse_ping(text: &str) -> Option<(u32, u32, Duration)> {
    let line = text.lines().find(|line| line.contains("packets transmitted"))?;
    let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
    let (sent, received) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    let average =
        text.lines().find_map(|line| line.strip_prefix("rtt ")?.split('/').nth(4)?.parse::<f64>().ok());
    Some((sent, received, Duration::from_secs_f64(average.unwrap_or(0.0) / 1000.0)))
}
