//! What the scenarios share.
#![allow(dead_code, unreachable_pub)] // Each test binary uses its part.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use netns_tests::bins::Bins;
use netns_tests::capture::Capture;
use netns_tests::lab::Lab;
use netns_tests::netns::Netns;
use netns_tests::pods::Pod;
use netns_tests::probe::{self, Outcome, Probe};
use netns_tests::spec::{self, Protocol};
use netns_tests::wait;

pub const CANARY: &[u8] = b"margay-probe";
pub const SERVER: &str = "apiServer: {ips: [192.0.2.100, '2001:db8::100']}\n";
/// For what waits for a retry of the agent's: at most 30 s apart.
pub const LONG: Duration = Duration::from_secs(90);

pub fn bins() -> Bins {
    Bins::beside(Path::new(env!("CARGO_BIN_EXE_mesh-lab"))).unwrap()
}

/// Two nodes, a pod on each, dual stack. `more` is appended to the lab file.
pub fn two(more: &str) -> spec::Lab {
    nodes("ab", more)
}

/// A node for each letter, with a pod `pa` on `a` and so on, dual stack. `more` is appended to the lab file.
pub fn nodes(letters: &str, more: &str) -> spec::Lab {
    let mut text = "\nname: letters\nnodes:\n".to_owned();
    for (name, n) in letters.chars().zip(1..) {
        text += &format!(
            "  - {{name: {name}, ips: [192.0.2.{n}, '2001:db8::{n}'], podCIDRs: [10.244.{n}.0/24, 'fd00:10:244:{n}::/64']}}\n"
        );
    }
    text += "pods:\n";
    for name in letters.chars() {
        text += &format!(
            "  - {{namespace: d, name: p{name}, node: {name}, labels: {{app: {name}}}, ports: [{{name: web, port: 8080}}, {{port: 8080, protocol: UDP}}, {{port: 8080, protocol: SCTP}}]}}\n"
        );
    }
    spec::Lab::parse(&(text + more)).unwrap()
}

/// A pod's address of a family.
pub fn address(pod: &Pod, v6: bool) -> IpAddr {
    *pod.ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap()
}

/// `ping` from pod to pod, under way: `count` of them, one each two milliseconds.
pub fn pings(lab: &Lab, from: &str, to: &str, v6: bool, count: u32) -> Child {
    let (from, to) = (lab.pod("d", from).unwrap(), lab.pod("d", to).unwrap());
    let mut command = from.netns.command("ping");
    command.args(["-n", "-q", "-i", "0.002", "-W", "2", "-c", &count.to_string()]);
    command.arg(address(to, v6).to_string()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Sent and received of pings that were under way.
pub fn end_of(pings: Child) -> (u32, u32) {
    let output = pings.wait_with_output().unwrap();
    let (sent, received, _) = parse_ping(&String::from_utf8_lossy(&output.stdout)).unwrap();
    (sent, received)
}

/// A paced TCP stream from pod to pod whose bytes are counted and compared; it must neither break nor stall. Returns how
/// many there were.
pub fn stream_until(lab: &Lab, from: &str, to: &str, v6: bool, done: &AtomicBool) -> u64 {
    let (from, to) = (lab.pod("d", from).unwrap(), lab.pod("d", to).unwrap());
    let listener = to.netns.run(|| TcpListener::bind(SocketAddr::new(address(to, v6), 0))).unwrap().unwrap();
    let at = listener.local_addr().unwrap();
    let mut client = from.netns.run(|| TcpStream::connect(at)).unwrap().unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut total, mut buffer) = (0u64, [0u8; 65536]);
            loop {
                match server.read(&mut buffer).expect("the stream stalled for three seconds") {
                    0 => return total,
                    count => {
                        for (index, byte) in buffer[..count].iter().enumerate() {
                            assert_eq!(*byte, ((total + index as u64) % 251) as u8);
                        }
                        total += count as u64;
                    }
                }
            }
        });
        let mut sent = 0u64;
        while !done.load(Ordering::SeqCst) {
            let block: Vec<u8> = (0..8192u64).map(|index| ((sent + index) % 251) as u8).collect();
            client.write_all(&block).unwrap();
            sent += block.len() as u64;
            std::thread::sleep(Duration::from_millis(2)); // Paced: the machine has other tests to run.
        }
        drop(client);
        assert_eq!(reader.join().unwrap(), sent);
        sent
    })
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

/// Waits for an issue of a node's agent, by reason.
pub fn has_issue(lab: &Lab, node: &str, reason: &str, object: &str) {
    wait::until(format!("{node} to tell {reason} of {object}"), LONG, || {
        let issues = lab.agent(node)?.status()?.issues;
        let found = issues.iter().any(|issue| issue.reason == reason && issue.object == object);
        anyhow::ensure!(found, "{issues:?}");
        Ok(Some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs(node)));
}

pub fn has_no_issue(lab: &Lab, node: &str) {
    wait::until(format!("{node} to have no issue"), LONG, || {
        let issues = lab.agent(node)?.status()?.issues;
        anyhow::ensure!(issues.is_empty(), "{issues:?}");
        Ok(Some(()))
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", lab.logs(node)));
}

/// Waits until probes of all nodes' pods get through, both ways and in both families.
pub fn reach(lab: &Lab, pairs: &[(&str, &str)]) {
    wait::until(format!("{pairs:?} to reach each other"), LONG, || {
        let probes = pairs.iter().flat_map(|(a, b)| all_between(lab, a, b));
        let probes: Vec<_> = probes.map(|probe| (probe, true)).collect();
        for ((probe, _), outcome) in probes.iter().zip(probe::all(&probes)?) {
            anyhow::ensure!(
                outcome == probe::Outcome::Allowed,
                "{} -> {}: {outcome}",
                probe.src,
                probe.listener
            );
        }
        Ok(Some(()))
    })
    .unwrap();
}

pub fn nothing_in_clear(capture: Capture) {
    let seen = capture.stop();
    assert!(seen.canaries.is_empty() && seen.mesh > 0, "{seen:?}");
}
