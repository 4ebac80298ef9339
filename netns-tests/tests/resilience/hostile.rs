//! Datagrams that nobody should send reach a node of a mesh that is at work. Each costs a counter, and nothing else.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::wait;
use netns_tests::wire::frame::{udp, udp_of};
use netns_tests::wire::tap::Tap;

use crate::support::{
    drops, flow, flows, handshakes, hex, key_bytes, metric, metrics, nothing_lost, peer, public_key, uapi,
    watched, wg,
};

/// A relay from the start: changing from the bridge to it would lose frames.
const RELAYED: &str = "underlay: {delayMs: 0.2}\n";

/// The wire between the node `a`, which is to suffer, and its peer `b`.
struct Between<'l> {
    lab: &'l Lab,
    a: Tap,
    b: Tap,
}

impl<'l> Between<'l> {
    fn new(lab: &'l Lab) -> Self {
        let tap = |host| Tap::on(lab.wire(), host).unwrap();
        Self { lab, a: tap("a"), b: tap("b") }
    }

    /// The next datagrams from b to a of this kind and longer than a keepalive, whole frames.
    fn hear(&self, kind: u8, count: usize) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let to: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        wait::until(format!("{count} datagrams of type {kind}"), PATIENCE, || {
            let fits = |frame: &Vec<u8>| {
                udp_of(frame).is_some_and(|(_, at, payload)| {
                    to.contains(&at.ip()) && payload.first() == Some(&kind) && payload.len() > 32
                })
            };
            found.extend(self.b.heard().into_iter().filter(fits));
            Ok((found.len() >= count).then_some(()))
        })
        .unwrap();
        found.truncate(count);
        found
    }

    /// A handshake that `node` begins with the other one now.
    fn handshake(&self, node: &str, with: &str) {
        let key = hex(&public_key(self.lab, with));
        uapi(self.lab, node, &format!("set=1\npublic_key={key}\nupdate_only=true\ninitiate=true"));
    }

    /// Hands a frames; they must be counted for this reason, each once.
    #[track_caller]
    fn costs(&self, reason: &str, frames: &[Vec<u8>]) {
        let before = drops(self.lab, "a", reason);
        frames.iter().for_each(|frame| self.a.deliver(frame).unwrap());
        self.counted(reason, before + frames.len() as u64);
    }

    #[track_caller]
    fn counted(&self, reason: &str, count: u64) {
        wait::until(format!("{reason} to be counted"), PATIENCE, || {
            let now = drops(self.lab, "a", reason);
            anyhow::ensure!(now >= count, "{reason}: {now} of {count}");
            Ok(Some(()))
        })
        .unwrap();
        assert_eq!(drops(self.lab, "a", reason), count, "{reason}");
    }
}

/// The same frame with another payload.
fn with(frame: &[u8], payload: &[u8]) -> Vec<u8> {
    let (from, to, _) = udp_of(frame).unwrap();
    udp(frame, from, to, payload).unwrap()
}

/// The same frame with one byte of its payload changed.
fn flipped(frame: &[u8], at: usize) -> Vec<u8> {
    let mut payload = udp_of(frame).unwrap().2.to_vec();
    payload[at] ^= 0x55;
    with(frame, &payload)
}

/// Bytes without any order (xorshift), the first of them no message's type.
fn garbage(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect();
    bytes[0] |= 0x80;
    bytes
}

/// Initiations by one who knows the public key and is nobody's peer.
struct Stranger(Tunn);

impl Stranger {
    fn to(lab: &Lab, node: &str) -> Self {
        let theirs = PublicKey::from(key_bytes(&public_key(lab, node)));
        Self(Tunn::new(StaticSecret::from([7; 32]), theirs, None, None, 9, None))
    }

    fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; 148];
        match self.0.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn hostile_datagrams_cost_a_counter_by_their_reason_and_no_peer_a_packet() {
    let (lab, _capture) = watched("abc", RELAYED);
    let running = [flows(&lab, "a", "b"), flows(&lab, "a", "c")].into_iter().flatten().collect();
    let wire = Between::new(&lab);
    let endpoints = || ["b", "c"].map(|peer| wg(&lab, "a", "endpoints", peer));
    let before = endpoints();

    wire.handshake("b", "a");
    let initiation = wire.hear(1, 1).remove(0);
    wire.handshake("a", "b");
    let response = wire.hear(2, 1).remove(0);
    let data = wire.hear(4, 50);
    let (_, to, _) = udp_of(&data[0]).unwrap();
    let bytes = |frame: &[u8]| udp_of(frame).unwrap().2.to_vec();

    // Again, from where they came and from elsewhere; and a burst of them twice.
    wire.costs("replayed", &data);
    let elsewhere: SocketAddr =
        if to.is_ipv4() { "192.0.2.66:666" } else { "[2001:db8::66]:666" }.parse().unwrap();
    wire.costs("replayed", &[udp(&data[0], elsewhere, to, &bytes(&data[0])).unwrap()]);
    wire.costs("replayed", &[&data[..], &data[..]].concat());
    wire.costs("stale_handshake", std::slice::from_ref(&initiation));
    wire.costs("unexpected", std::slice::from_ref(&response));
    // Too short, too long, changed, made up.
    let short =
        [&bytes(&data[0])[..31], &bytes(&initiation)[..147], &[4], &[]].map(|part| with(&data[0], part));
    wire.costs("truncated", &short);
    wire.costs("oversized", &[with(&data[0], &[&bytes(&initiation)[..], &[0; 1000]].concat())]);
    let noise: Vec<Vec<u8>> = (1..=100).map(|n| with(&data[0], &garbage(n * 14, n as u64))).collect();
    wire.costs("unknown_type", &noise);
    wire.costs("unknown_index", &[flipped(&data[0], 5), flipped(&response, 9)]);
    let mut last = bytes(&data[0]);
    last[8..16].fill(0xff);
    wire.costs("counter_exhausted", &[with(&data[0], &last)]);
    // Counters that are still to come: the window must not move by a forgery.
    let ahead: Vec<Vec<u8>> = (1..=20).map(|n| flipped(&data[n], 12)).collect();
    wire.costs("bad_auth", &ahead);
    wire.costs("bad_mac", &[flipped(&initiation, 120), flipped(&initiation, 40)]);
    wire.costs("unknown_peer", &[with(&initiation, &Stranger::to(&lab, "a").initiation())]);

    assert_eq!(endpoints(), before, "nobody moved");
    nothing_lost(running);
    told_everywhere(
        &lab,
        &["replayed", "truncated", "unknown_type", "bad_auth", "bad_mac", "stale_handshake"],
    );
}

/// Device counters are the same in `get=stats`, in `meshctl peers -v` and in the metrics, and happened.
fn told_everywhere(lab: &Lab, reasons: &[&str]) {
    wait::until("meshctl and metrics to tell it", PATIENCE, || {
        let table = lab.host("a")?.run(&["meshctl", "peers", "-v"])?;
        let metrics = metrics(lab, "a");
        for reason in reasons {
            let count = drops(lab, "a", reason);
            let labels = [("iface", "margay0"), ("reason", *reason)];
            let counted = metric(&metrics, "margay_datapath_drops_total", &labels);
            let row = ["margay0", *reason, &count.to_string()];
            let told = table.lines().any(|line| line.split_whitespace().eq(row));
            anyhow::ensure!(
                count > 0 && told && counted == Some(count as f64),
                "{row:?}: {counted:?}\n{table}"
            );
        }
        Ok(Some(()))
    })
    .unwrap();
}

#[test]
fn a_flood_of_handshakes_and_forgeries_keeps_no_peer_from_its_handshake() {
    let (lab, _capture) = watched("ab", RELAYED);
    let running = flows(&lab, "a", "b");
    let wire = Between::new(&lab);
    let like = wire.hear(4, 1).remove(0);
    let (from, to, _) = udp_of(&like).unwrap();
    let at = |n: u16, port| {
        let ip = if to.is_ipv4() { format!("192.0.2.{n}") } else { format!("2001:db8::{n}") };
        SocketAddr::new(ip.parse().unwrap(), port)
    };
    let mut stranger = Stranger::to(&lab, "a");
    // Well beyond what all together may send in a second, from many ports; and data for sessions that are none, from many
    // addresses.
    let mut flood = Vec::new();
    for n in 0..4000 {
        flood.push(udp(&like, at(66, 1024 + n), to, &stranger.initiation()).unwrap());
        let stray = [&[4, 0, 0, 0][..], &garbage(60, n.into())].concat();
        flood.push(udp(&like, at(100 + n % 100, 1024 + n), to, &stray).unwrap());
    }
    let told = |lab: &Lab| {
        ["unknown_peer", "cookie_demanded", "unknown_index"].map(|reason| drops(lab, "a", reason))
    };
    let count = || handshakes(&lab, "b", &["a"])[0].1.unwrap();
    let (before, shaken_before) = (told(&lab), count());
    let start = Instant::now();
    let mut begun = start;
    for (n, frame) in flood.iter().enumerate() {
        wire.a.deliver(frame).unwrap();
        if n == 4000 {
            // In the thick of it: the source has used up everything, the handshake comes from another.
            wire.handshake("b", "a");
            begun = Instant::now();
        }
    }
    let sent = start.elapsed();
    wait::until("the handshake to complete", PATIENCE, || Ok((count() > shaken_before).then_some(())))
        .unwrap();
    let shaken = begun.elapsed();
    println!("{} datagrams in {sent:?}; the handshake took {shaken:?}", flood.len());
    // Without a cookie it is one round trip; with one it would wait for its retry, after 5 s.
    assert!(shaken < Duration::from_secs(4), "{shaken:?}");
    wait::until("all to be counted", PATIENCE, || {
        let counted: u64 = told(&lab).iter().zip(before).map(|(now, before)| now - before).sum();
        anyhow::ensure!(counted == flood.len() as u64, "{counted}");
        Ok(Some(()))
    })
    .unwrap();
    assert_eq!(drops(&lab, "a", "handshake_queue_full"), 0);
    let [strangers, cookies, _] = told(&lab);
    println!("{strangers} were worked on, {cookies} answered by a cookie");
    // A burst of 32 and 20 a second.
    assert!(strangers <= 32 + 20 * (sent.as_secs() + 2) && cookies > 3000, "{strangers} {cookies}");
    assert_eq!(wg(&lab, "a", "endpoints", "b"), from.to_string());
    nothing_lost(running);
    told_everywhere(&lab, &["unknown_peer", "cookie_demanded"]);
}

#[test]
fn a_node_that_sends_from_another_nodes_address_is_named() {
    let (lab, _capture) = watched("abc", "");
    let running = flows(&lab, "a", "b");
    drop(flow(&lab, "c", "a", false));
    let before = peer(&lab, "a", "c").drops.get("spoofed_source").copied().unwrap_or(0);
    assert_eq!(before, 0);
    // Root on c takes addresses of b's pods; c's own datapath does not mind, and its agent is not asked.
    let host = lab.host("c").unwrap();
    host.stop_unit("mesh-agent").unwrap();
    let pod = lab.pod("d", "pa").unwrap();
    for (v6, address, prefix) in [(false, "10.244.2.77", 32), (true, "fd00:10:244:2::77", 128)] {
        let nodad = if v6 { " nodad" } else { "" };
        host.netns().ip(&[format!("addr add {address}/{prefix} dev margay0{nodad}")]).unwrap();
        let to = crate::common::address(pod, v6).to_string();
        let ping = host
            .command(&["ping", "-n", "-q", "-c", "5", "-i", "0.05", "-W", "1", "-I", address, &to])
            .output()
            .unwrap();
        assert!(!ping.status.success(), "{}", String::from_utf8_lossy(&ping.stdout));
    }
    wait::until("meshctl and metrics to name c", PATIENCE, || {
        let table = lab.host("a")?.run(&["meshctl", "peers", "-v"])?;
        let told =
            table.lines().any(|line| line.split_whitespace().eq(["peer", "c", "spoofed_source", "10"]));
        let labels = [("iface", "margay0"), ("peer", "c"), ("reason", "spoofed_source")];
        let counted = metric(&metrics(&lab, "a"), "margay_peer_drops_total", &labels);
        anyhow::ensure!(told && counted == Some(10.0), "{counted:?}\n{table}");
        Ok(Some(()))
    })
    .unwrap();
    assert!(!peer(&lab, "a", "b").drops.contains_key("spoofed_source"));
    nothing_lost(running);
}

#[test]
fn reordered_datagrams_are_all_taken() {
    let (mut lab, _capture) = watched("ab", RELAYED);
    let before =
        ["replayed", "unknown_index"].map(|reason| drops(&lab, "a", reason) + drops(&lab, "b", reason));
    let running = flows(&lab, "a", "b");
    lab.wire_mut().change("a", "b", |link| link.reorder = 0.3).unwrap();
    wait::until("many to be overtaken", PATIENCE, || {
        let counts = [lab.wire().counts("a", "b"), lab.wire().counts("b", "a")];
        Ok(counts.iter().all(|counts| counts.reordered > 200).then_some(()))
    })
    .unwrap();
    nothing_lost(running);
    let after =
        ["replayed", "unknown_index"].map(|reason| drops(&lab, "a", reason) + drops(&lab, "b", reason));
    assert_eq!(after, before);
}
