//! `mesh-lab demo`: three hosts, six pods, everything shown with real packets, and nothing left.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_api::defaults::{BPF_DIR, DEVICE, DEVICES, PORT, TABLE};
use mesh_api::status::{DenyEvent, PeerState};
use serde_json::json;

use crate::bins::Bins;
use crate::capture::{Capture, Seen};
use crate::control;
use crate::lab::{Lab, PATIENCE, datapath_unit};
use crate::leaks::{self, Machine};
use crate::manifests;
use crate::probe::{self, Outcome, Probe};
use crate::spec::{self, Protocol};
use crate::throughput;
use crate::wait;

/// Bytes that every probe carries and the wire must never show.
const CANARY: &[u8] = b"margay-probe";

const LAB: &str = include_str!("../labs/demo.yaml");

/// The demo's lab.
pub fn lab() -> Result<spec::Lab> {
    spec::Lab::parse(LAB).context("labs/demo.yaml")
}

fn say(what: impl Display) {
    crate::say!("{what}");
    std::io::stdout().flush().ok();
}

/// Runs the demo. With `keep` the lab stays (and this process with it) after everything but the clean-up.
pub fn run(bins: &Bins, keep: bool) -> Result<()> {
    let start = Instant::now();
    let before = Machine::look()?;
    say("Three hosts on a wire, two pods each, in network namespaces of this machine:\n");
    say("   a [red, blue]      b [red, blue]      c [red, blue]     pods: IPv4 and IPv6, namespace `demo`");
    say("        │                  │                  │");
    say(
        "   ─────┴──────────────────┴──────────────────┴─────       the wire: captured from the first frame\n",
    );

    let mut lab = Lab::plug(lab()?, bins)?;
    let capture = Capture::start(lab.wire().netns(), &[PORT], &[CANARY])?;
    lab.address()?;
    lab.start_mesh()?;
    lab.settle(PATIENCE)?;
    say(step(start, "mesh-datapath and mesh-agent run on every host; each has a key and knows its peers"));
    lab.start_pods()?;
    say(step(start, "mesh-cni gave six pods their addresses"));

    let count = reach_all(&lab)?;
    say(step(
        start,
        &format!("every pod reaches every pod: {count} probes by TCP and UDP, IPv4 and IPv6, each echoed"),
    ));
    show_status(&lab)?;
    policy(&mut lab, start)?;
    let missed = capture.seen().missed;
    let rate = {
        let (from, to) = (lab.pod("demo", "red-a")?, lab.pod("demo", "red-b")?);
        let ip = *to.ips.first().context("pod without an address")?;
        throughput::tcp(from, to, ip, Duration::from_secs(2))?
    };
    say(step(start, &format!("one TCP stream through the tunnel, pod to pod: {rate:.0} Mbit/s")));
    let fast = capture.seen().missed - missed;

    if keep {
        let seen = capture.stop();
        say(step(start, &shown(&seen, fast)?));
        try_this(&lab);
        return control::keep(lab);
    }
    clean_up(&mut lab)?;
    say(step(start, "mesh-agent cleanup: no device, route, rule, table or pin of ours is left on a host"));
    let namespaces = lab.namespaces()?;
    lab.end_hosts();
    let seen = capture.stop();
    say(step(start, &shown(&seen, fast)?));
    drop(lab);
    nothing_left(&before, bins, &namespaces)?;
    say(step(
        start,
        "nothing is left on this machine: no process, namespace, link, route, rule, mount or pin",
    ));
    say(format!(
        "\nThe demo took {:.0} s. `mesh-lab demo --keep` leaves it up to play with.",
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

fn step(start: Instant, what: &str) -> String {
    format!("[{:4.1} s] {what}", start.elapsed().as_secs_f64())
}

/// All ordered pairs of pods, both families, TCP and UDP.
fn reach_all(lab: &Lab) -> Result<usize> {
    let mut probes = Vec::new();
    let pods: Vec<_> = lab.pods().collect();
    for from in &pods {
        for to in pods.iter().filter(|to| to.netns.inode().ok() != from.netns.inode().ok()) {
            for (src, dst) in from.ips.iter().flat_map(|src| to.ips.iter().map(move |dst| (*src, *dst))) {
                for protocol in
                    [Protocol::Tcp, Protocol::Udp].into_iter().filter(|_| src.is_ipv4() == dst.is_ipv4())
                {
                    let listener = format!("{}/{}", to.spec.namespace, to.spec.name);
                    probes.push((
                        Probe { from: from.netns.clone(), src, dst, port: 8080, protocol, listener },
                        true,
                    ));
                }
            }
        }
    }
    for ((probe, _), outcome) in probes.iter().zip(probe::all(&probes)?) {
        ensure!(
            outcome == Outcome::Allowed,
            "{} -> {} ({}) {}: {outcome}",
            probe.src,
            probe.dst,
            probe.listener,
            probe.protocol
        );
    }
    Ok(probes.len())
}

fn show_status(lab: &Lab) -> Result<()> {
    for node in lab.node_names() {
        let agent = lab.agent(&node)?;
        wait::until(format!("fresh handshakes on {node}"), PATIENCE, || {
            let peers = agent.status()?.peers;
            let fresh = peers.iter().all(|peer| {
                peer.state == PeerState::Up && peer.handshake_age_seconds.is_some_and(|age| age < 120)
            });
            Ok((fresh && peers.len() == 2).then_some(()))
        })?;
    }
    let status = lab.host("a")?.run(&["meshctl", "status"])?;
    say(format!("\nhost a$ meshctl status\n{}", indent(&status)));
    let wg = lab.host("a")?.run(&["wg", "show", DEVICE, "latest-handshakes"])?;
    ensure!(wg.lines().count() == 2, "`wg show` does not list two peers: {wg}");
    Ok(())
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("   {line}\n")).collect()
}

/// A policy that lets one pod in and nobody else, and the event of a denied packet.
fn policy(lab: &mut Lab, start: Instant) -> Result<()> {
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "blue"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "blue"}}}], "ports": [{"port": 8080}]}],
    });
    lab.put(manifests::policy("demo", "blue-only", spec))?;
    lab.enforced()?;
    let to = lab.pod("demo", "blue-b")?.clone();
    for (from, allowed) in [("blue-a", true), ("red-a", false)] {
        let from = lab.pod("demo", from)?;
        let listener = "demo/blue-b".to_string();
        for (src, dst) in from.ips.iter().zip(&to.ips) {
            let probe = Probe {
                from: from.netns.clone(),
                src: *src,
                dst: *dst,
                port: 8080,
                protocol: Protocol::Tcp,
                listener: listener.clone(),
            };
            let outcome = probe::all(&[(probe, allowed)])?.pop().context("no outcome")?;
            let want = if allowed { Outcome::Allowed } else { Outcome::Dropped };
            ensure!(outcome == want, "demo/{} -> demo/blue-b: {outcome}, expected {want}", from.spec.name);
        }
    }
    let event = deny_event(lab, "b", &lab.pod("demo", "red-a")?.ips, &to.ips)?;
    say(step(
        start,
        "NetworkPolicy demo/blue-only: blue-a reaches blue-b, red-a does not; the event says why:",
    ));
    let policies = event.policies.join(", ");
    say(format!(
        "           {} {} {}:{} -> {}:{} {} at {} by {}\n",
        event.direction,
        event.protocol,
        event.src,
        event.src_port,
        event.dst,
        event.dst_port,
        event.reason,
        event.endpoint,
        policies
    ));
    Ok(())
}

/// Waits for the event of a packet that policy dropped on a node.
pub fn deny_event(
    lab: &Lab,
    node: &str,
    from: &[std::net::IpAddr],
    to: &[std::net::IpAddr],
) -> Result<DenyEvent> {
    let agent = lab.agent(node)?;
    wait::until("the event of the denied packet", PATIENCE, || {
        let events = agent.events()?;
        Ok(events.into_iter().rev().find(|event| from.contains(&event.src) && to.contains(&event.dst)))
    })
}

/// What the capture showed, in a line; an error if it showed what it must not.
fn shown(seen: &Seen, fast: u64) -> Result<String> {
    seen.check()?;
    ensure!(seen.mesh > 0, "the capture saw no frame of the mesh: it proves nothing");
    ensure!(
        seen.missed == fast,
        "the capture missed {} frames outside the throughput test",
        seen.missed - fast
    );
    let links = seen.links.len();
    let (out, back) = seen.links.values().fold((0, 0), |sum, link| (sum.0 + link.0, sum.1 + link.1));
    let note = if fast > 0 {
        format!(" ({fast} of the fast stream checked by their headers only)")
    } else {
        String::new()
    };
    Ok(format!(
        "the wire showed {} datagrams of UDP {PORT}, {} of ARP and neighbour discovery, and nothing else: {out} out of and {back} into \
         hosts on {links} interfaces{note}; no probe's text in clear",
        seen.mesh, seen.neighbours
    ))
}

/// Takes the pods away, stops the units and lets the agent clean up; then looks for remains on each host.
fn clean_up(lab: &mut Lab) -> Result<()> {
    let pods: Vec<_> = lab.pods().map(|pod| (pod.spec.namespace.clone(), pod.spec.name.clone())).collect();
    for (namespace, name) in pods {
        lab.remove_pod(&namespace, &name)?;
    }
    for node in lab.node_names() {
        clean_host(lab, &node)?;
    }
    Ok(())
}

/// Stops a node's units, runs `mesh-agent cleanup` and checks that nothing of ours is left.
pub fn clean_host(lab: &Lab, node: &str) -> Result<()> {
    let host = lab.host(node)?;
    host.stop_unit("mesh-agent")?;
    for device in DEVICES {
        host.stop_unit(&datapath_unit(device))?;
    }
    host.run(&["mesh-agent", "cleanup"])?;
    let mut left = Vec::new();
    for (what, argv) in [
        ("link", &["ip", "-br", "link"][..]),
        ("rule", &["ip", "-4", "rule"]),
        ("rule", &["ip", "-6", "rule"]),
        ("route", &["ip", "-4", "route", "show", "table", "all"]),
        ("route", &["ip", "-6", "route", "show", "table", "all"]),
        ("nft table", &["nft", "list", "tables"]),
    ] {
        let ours = |line: &&str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            DEVICES.iter().any(|device| line.starts_with(device))
                || line.starts_with("mgy")
                || words.contains(&TABLE.to_string().as_str())
                || words
                    .windows(2)
                    .any(|pair| pair == ["proto", "142"] || pair[0] == "dev" && DEVICES.contains(&pair[1]))
                || line.trim() == "table inet margay"
                || line.starts_with("3000")
        };
        left.extend(host.run(argv)?.lines().filter(ours).map(|line| format!("{what}: {line}")));
    }
    if host.path(BPF_DIR).exists() {
        left.push(format!("BPF pins: {BPF_DIR}"));
    }
    if !left.is_empty() {
        bail!("left on {node} after `mesh-agent cleanup`:\n  {}", left.join("\n  "));
    }
    Ok(())
}

/// The machine is as it was. The kernel takes namespaces down in its own time, so this waits for it.
pub fn nothing_left(before: &Machine, bins: &Bins, namespaces: &[u64]) -> Result<()> {
    wait::until("the machine to be as it was", PATIENCE, || {
        let mut left = leaks::left(&bins.run, namespaces)?;
        left.extend(before.difference(&Machine::look()?));
        if left.is_empty() {
            return Ok(Some(()));
        }
        bail!("{}", left.join("\n  "))
    })
}

fn try_this(lab: &Lab) {
    let ips: BTreeMap<String, String> = lab
        .pods()
        .map(|pod| (pod.spec.name.clone(), pod.ips.first().map(ToString::to_string).unwrap_or_default()))
        .collect();
    let ip = |name: &str| ips.get(name).cloned().unwrap_or_default();
    say("\nIt is up. Try:");
    let lab_bin = lab.bins().lab.display();
    for command in [
        "exec node/a -- meshctl status".to_string(),
        "exec node/a -- wg show".to_string(),
        format!("exec pod/demo/red-a -- ping -c 3 {}", ip("red-c")),
        format!("exec pod/demo/red-a -- ping -c 3 {}   # denied: blue-only", ip("blue-b")),
        "exec node/b -- meshctl policy list".to_string(),
        "link a b cut     # and: link a b heal".to_string(),
        "status".to_string(),
        "down".to_string(),
    ] {
        say(format!("   {lab_bin} {command}"));
    }
}
