//! The lab's own parts, without the mesh: the wire does what the lab file says, the capture sees what it
//! must, the probes tell dropped from refused, and nothing outlives its owner.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use common::{bins, ping};
use netns_tests::capture::Capture;
use netns_tests::host::Host;
use netns_tests::lab::Lab;
use netns_tests::leaks::{self, Machine};
use netns_tests::probe::server::Server;
use netns_tests::probe::{Outcome, Probe};
use netns_tests::spec::{self, Protocol};
use netns_tests::wait;

/// Two bare hosts on a wire with this `underlay` section.
fn hosts(underlay: &str) -> Lab {
    let text = format!(
        "name: wire\nnodes:\n  - {{name: a, ips: [192.0.2.1, '2001:db8::1']}}\n  - {{name: b, ips: [192.0.2.2, '2001:db8::2']}}\n{underlay}"
    );
    let mut lab = Lab::plug(spec::Lab::parse(&text).unwrap(), &bins()).unwrap();
    lab.address().unwrap();
    lab
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn output(lab: &Lab, host: &str, argv: &[&str]) -> String {
    let output = lab.host(host).unwrap().command(argv).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_host_has_its_own_name_files_and_processes() {
    let lab = hosts("");
    let host = lab.host("a").unwrap();
    assert_eq!(host.run(&["hostname"]).unwrap().trim(), "a");
    assert_eq!(
        host.run(&[
            "find",
            "/var/lib/margay",
            "/sys/fs/bpf",
            "/etc/margay",
            "-mindepth",
            "1",
            "-not",
            "-name",
            "*.debug"
        ])
        .unwrap_or_default(),
        ""
    );
    let processes = host.run(&["sh", "-c", "ls -d /proc/[0-9]*"]).unwrap();
    assert!(processes.lines().count() <= 4, "{processes}");
    let status = host.command(&["sh", "-c", "exit 42"]).status().unwrap();
    assert_eq!(status.code(), Some(42));
    assert!(host.run(&["cat", "/etc/passwd"]).unwrap().contains("root"));
}

#[test]
fn a_clean_wire_joins_hosts_in_both_families() {
    let lab = hosts("");
    let netns = lab.host("a").unwrap().netns();
    for to in ["192.0.2.2", "2001:db8::2"] {
        let (sent, received, _) = ping(netns, ip(to), 5, 0.05);
        assert_eq!((sent, received), (5, 5), "{to}");
    }
}

#[test]
fn delay_is_what_the_lab_file_says() {
    let lab = hosts("underlay: {delayMs: 20}");
    let (_, received, average) = ping(lab.host("a").unwrap().netns(), ip("192.0.2.2"), 10, 0.05);
    assert_eq!(received, 10);
    assert!(average >= Duration::from_millis(40) && average < Duration::from_millis(60), "{average:?}");
}

#[test]
fn loss_is_what_the_lab_file_says_and_is_counted() {
    let lab = hosts("underlay: {lossPercent: 20}");
    let netns = lab.host("a").unwrap().netns();
    // Address resolution may itself be lost: not what is measured here.
    ping(netns, ip("192.0.2.2"), 5, 0.05);
    let (sent, received, _) = ping(netns, ip("192.0.2.2"), 300, 0.004);
    // 36 % of round trips; five standard deviations of 300 are 14 points.
    let lost = f64::from(sent - received) / f64::from(sent);
    assert!((0.22..0.50).contains(&lost), "{lost}");
    let counts = lab.wire().counts("a", "b");
    assert!(counts.lost > 20 && counts.delivered > 150, "{counts:?}");
}

#[test]
fn reordered_packets_are_overtaken() {
    let lab = hosts("underlay: {reorderPercent: 20, delayMs: 1}");
    let (a, b) = (lab.host("a").unwrap().netns(), lab.host("b").unwrap().netns());
    let receiver = b.run(|| UdpSocket::bind("192.0.2.2:9000")).unwrap().unwrap();
    let sender = a.run(|| UdpSocket::bind("192.0.2.1:9000")).unwrap().unwrap();
    for number in 0u32..200 {
        sender.send_to(&number.to_be_bytes(), "192.0.2.2:9000").unwrap();
        std::thread::sleep(Duration::from_micros(500));
    }
    receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut numbers = Vec::new();
    let mut bytes = [0; 4];
    while receiver.recv(&mut bytes).is_ok() {
        numbers.push(u32::from_be_bytes(bytes));
    }
    assert_eq!(numbers.len(), 200);
    let overtaken = numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(overtaken >= 5, "{overtaken} of 200");
    assert!(lab.wire().counts("a", "b").reordered >= 5);
}

#[test]
fn a_narrow_hop_says_so_and_an_icmp_dead_one_does_not() {
    let lab = hosts("underlay: {mtu: 1300}");
    for (to, size) in [("192.0.2.2", "1400"), ("2001:db8::2", "1400")] {
        let first =
            output(&lab, "a", &["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", size, to]);
        assert!(
            first.contains("mtu=1300") || first.contains("mtu: 1300") || first.contains("mtu 1300"),
            "{first}"
        );
    }
    // Without DF, IPv4 is fragmented by the hop.
    let fragmented = output(
        &lab,
        "b",
        &["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "dont", "-s", "1400", "192.0.2.1"],
    );
    assert!(fragmented.contains(" 0% packet loss"), "{fragmented}");
    drop(lab);
    let lab = hosts("underlay: {mtu: 1300, icmpDead: true}");
    let silent = output(
        &lab,
        "a",
        &["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", "1400", "192.0.2.2"],
    );
    assert!(silent.contains("100% packet loss") && !silent.contains("mtu"), "{silent}");
    assert!(lab.wire().counts("a", "b").too_big >= 2);
}

#[test]
fn a_link_is_cut_and_healed_while_it_runs() {
    let mut lab = hosts("");
    let netns = lab.host("a").unwrap().netns().clone();
    assert_eq!(ping(&netns, ip("192.0.2.2"), 2, 0.05).1, 2);
    lab.wire_mut().cut("a", "b", true).unwrap();
    assert_eq!(ping(&netns, ip("192.0.2.2"), 2, 0.05).1, 0);
    lab.wire_mut().cut("a", "b", false).unwrap();
    assert_eq!(ping(&netns, ip("192.0.2.2"), 2, 0.05).1, 2);
}

#[test]
fn a_host_behind_nat_is_seen_with_the_routers_address() {
    let lab = hosts("underlay: {nat: [{host: a, public: [198.51.100.7, '2001:db8:7::7']}]}");
    let (a, b) = (lab.host("a").unwrap().netns(), lab.host("b").unwrap().netns());
    for (from, to, seen) in [
        ("192.0.2.1:9", "192.0.2.2:9", "198.51.100.7"),
        ("[2001:db8::1]:9", "[2001:db8::2]:9", "2001:db8:7::7"),
    ] {
        let server = b.run(|| UdpSocket::bind(to)).unwrap().unwrap();
        let client = a.run(|| UdpSocket::bind(from)).unwrap().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        client.send_to(b"hello", to).unwrap();
        let mut bytes = [0; 8];
        let (_, source) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(source.ip(), ip(seen));
        server.send_to(b"back", source).unwrap();
        client.recv_from(&mut bytes).unwrap();
    }
    assert_eq!(ping(b, ip("192.0.2.1"), 1, 0.1).1, 0, "nobody reaches the private address");
}

#[test]
fn the_capture_sees_strangers_and_canaries_both_ways() {
    let lab = hosts("");
    let capture = Capture::start(lab.wire().netns(), &[51820], &[b"canary-7"]).unwrap();
    let (a, b) = (lab.host("a").unwrap().netns(), lab.host("b").unwrap().netns());
    let _server = b.run(|| UdpSocket::bind("192.0.2.2:51820")).unwrap().unwrap();
    let mesh = a.run(|| UdpSocket::bind("192.0.2.1:51820")).unwrap().unwrap();
    mesh.send_to(b"sealed", "192.0.2.2:51820").unwrap();
    wait::until("the datagram", Duration::from_secs(2), || Ok((capture.seen().mesh >= 2).then_some(())))
        .unwrap();
    capture.seen().check().unwrap();
    let clear = a.run(|| UdpSocket::bind("192.0.2.1:53")).unwrap().unwrap();
    clear.send_to(b"x", "192.0.2.2:51820").unwrap();
    wait::until("the stranger", Duration::from_secs(2), || Ok((capture.seen().strangers >= 2).then_some(())))
        .unwrap();
    assert!(capture.seen().check().unwrap_err().to_string().contains("192.0.2.1 to 192.0.2.2"));
    mesh.send_to(b"a canary-7 in clear", "192.0.2.2:51820").unwrap();
    wait::until("the canary", Duration::from_secs(2), || {
        Ok((!capture.seen().canaries.is_empty()).then_some(()))
    })
    .unwrap();
    let seen = capture.stop();
    assert_eq!(seen.canaries["canary-7"], 2, "once out of a, once into b");
    assert_eq!(seen.missed, 0);
}

#[test]
fn probes_tell_allowed_dropped_and_refused_apart() {
    let lab = hosts("");
    let server = Server::start().unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    b.run(&["nft", "table inet t { chain c { type filter hook input priority 0; tcp dport 81 drop; udp dport 81 drop; sctp dport 81 drop; \
        tcp dport 82 reject with tcp reset; udp dport 82 reject; sctp dport 82 reject; }; }"]).unwrap();
    for (src, dst) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            for port in [80, 81, 82] {
                server.listen(b.netns(), "b", "b", ip(dst), port, protocol).unwrap();
            }
            let attempt = |port| {
                let probe = Probe {
                    from: a.netns().clone(),
                    src: ip(src),
                    dst: ip(dst),
                    port,
                    protocol,
                    listener: "b".into(),
                };
                probe.attempt(Duration::from_millis(700))
            };
            assert_eq!(attempt(80), Outcome::Allowed, "{protocol} to {dst}");
            assert_eq!(attempt(81), Outcome::Dropped, "{protocol} to {dst}");
            let refused = attempt(82);
            assert!(matches!(refused, Outcome::Refused(_)), "{protocol} to {dst}: {refused}");
        }
    }
    server.close("b").unwrap();
    wait::until("the listener to be gone", Duration::from_secs(2), || {
        let probe = Probe {
            from: a.netns().clone(),
            src: ip("192.0.2.1"),
            dst: ip("192.0.2.2"),
            port: 80,
            protocol: Protocol::Tcp,
            listener: "b".into(),
        };
        Ok(matches!(probe.attempt(Duration::from_millis(300)), Outcome::Refused(_)).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_unit_that_dies_is_started_again_and_a_rebooted_host_keeps_its_disk() {
    let bins = bins();
    let mut host = Host::start("u", &bins).unwrap();
    host.start_unit("sleeper", &["sleep", "1000"]).unwrap();
    let (first, _) = host.unit("sleeper").unwrap();
    host.kill_unit("sleeper").unwrap();
    wait::until("a new process", Duration::from_secs(3), || {
        let (pid, restarts) = host.unit("sleeper")?;
        Ok((pid.is_some() && pid != first && restarts == 1).then_some(()))
    })
    .unwrap();
    host.write("/var/lib/margay/key", b"kept").unwrap();
    let old = host.netns().inode().unwrap();
    host.kill();
    let again = host.reboot().unwrap();
    assert_eq!(again.run(&["cat", "/var/lib/margay/key"]).unwrap(), "kept");
    assert_ne!(again.netns().inode().unwrap(), old);
    assert!(again.unit("sleeper").is_err());
}

#[test]
fn a_lab_that_ends_leaves_nothing() {
    let before = Machine::look().unwrap();
    let lab = hosts("underlay: {nat: [{host: a, public: [198.51.100.7]}]}");
    let namespaces = lab.namespaces().unwrap();
    assert_eq!(namespaces.len(), 4);
    let run = lab.bins().run.clone();
    assert!(!leaks::left(&run, &namespaces).unwrap().is_empty(), "the check sees what is there");
    drop(lab);
    wait::until("the machine to be as before", Duration::from_secs(10), || {
        let mut left = leaks::left(&run, &namespaces)?;
        left.extend(before.difference(&Machine::look()?));
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap();
}
