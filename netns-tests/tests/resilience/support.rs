//! What these scenarios share.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mesh_api::status::{PeerStatus, Status};
use netns_tests::capture::{Capture, Seen};
use netns_tests::flow::{CANARY, Count, Flow};
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::wait;

use crate::common::{address, bins, nodes};

/// Pace of every flow.
const EVERY: Duration = Duration::from_millis(5);
const UAPI: &str = "/run/wireguard/margay0.sock";

/// A lab with a node for each letter, whose wire is captured from before the first address.
pub(crate) fn watched(letters: &str, more: &str) -> (Lab, Capture) {
    let mut lab = Lab::plug(nodes(letters, more), &bins()).unwrap();
    let capture = Capture::start(lab.wire().netns(), &[51820], &[CANARY, b"margay-probe"]).unwrap();
    lab.address().unwrap();
    lab.start_mesh().unwrap();
    lab.settle(PATIENCE).unwrap();
    lab.start_pods().unwrap();
    (lab, capture)
}

/// A flow between the pods of two nodes, once its first answers have come: the handshake is over by then.
pub(crate) fn flow(lab: &Lab, from: &str, to: &str, v6: bool) -> Flow {
    let [near, far] = [from, to].map(|node| lab.pod("d", &format!("p{node}")).unwrap());
    let ends = ((&near.netns, address(near, v6)), (&far.netns, address(far, v6)));
    wait::until(format!("{from} to reach {to}"), PATIENCE, || {
        let first = Flow::start(ends.0, ends.1, Duration::from_millis(20))?;
        std::thread::sleep(Duration::from_millis(100));
        Ok((first.count().answered > 0).then_some(()))
    })
    .unwrap();
    Flow::start(ends.0, ends.1, EVERY).unwrap()
}

/// Flows both ways between two nodes, in both families.
pub(crate) fn flows(lab: &Lab, a: &str, b: &str) -> Vec<Flow> {
    [(a, b, false), (b, a, true), (a, b, true), (b, a, false)]
        .map(|(from, to, v6)| flow(lab, from, to, v6))
        .into()
}

/// Stops flows of which nothing may be lost or come twice.
pub(crate) fn nothing_lost(flows: Vec<Flow>) {
    for flow in flows {
        let count = flow.stop();
        println!("{count:?}");
        assert!(count.sent > 0 && count.lost() == 0 && count.duplicates == 0, "{count:?}");
    }
}

/// Waits until a flow is answered again, as it is once 20 more have come; how long that took.
pub(crate) fn goes_on(what: &str, flow: &Flow, limit: Duration) -> Duration {
    let (start, before) = (Instant::now(), flow.count().answered);
    wait::until(format!("{what} to go on"), limit, || {
        let count = flow.count();
        anyhow::ensure!(count.answered >= before + 20, "{count:?}");
        Ok(Some(()))
    })
    .unwrap();
    start.elapsed()
}

/// Waits until a flow is not answered any more.
pub(crate) fn falls_silent(flow: &Flow) {
    wait::until("the flow to be cut", PATIENCE, || {
        let before = flow.count().answered;
        // Longer than a busy machine may stall.
        std::thread::sleep(Duration::from_millis(500));
        Ok((flow.count().answered == before).then_some(()))
    })
    .unwrap();
}

/// What a node's agent says.
pub(crate) fn status(lab: &Lab, node: &str) -> Status {
    lab.agent(node).unwrap().status().unwrap()
}

/// What a node's agent says of a peer.
pub(crate) fn peer(lab: &Lab, node: &str, name: &str) -> PeerStatus {
    status(lab, node).peers.into_iter().find(|peer| peer.name == name).unwrap()
}

/// A node's public key, base64.
pub(crate) fn public_key(lab: &Lab, node: &str) -> String {
    lab.host(node).unwrap().run(&["wg", "show", "margay0", "public-key"]).unwrap().trim().to_owned()
}

/// `wg show margay0 WHAT` on a node, of one peer; empty if that is none.
pub(crate) fn wg(lab: &Lab, node: &str, what: &str, peer: &str) -> String {
    let key = public_key(lab, peer);
    let text = lab.host(node).unwrap().run(&["wg", "show", "margay0", what]).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&key));
    line.unwrap_or_default().trim().to_owned()
}

/// One request to a node's datapath and its reply.
pub(crate) fn uapi(lab: &Lab, node: &str, request: &str) -> String {
    let mut stream = UnixStream::connect(lab.host(node).unwrap().path(UAPI)).unwrap();
    stream.write_all(format!("{request}\n\n").as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.contains("errno=0"), "{request}: {reply}");
    reply
}

/// A number of a node's device as `get=stats` has it, before the first peer.
pub(crate) fn device_counter(lab: &Lab, node: &str, name: &str) -> u64 {
    let reply = uapi(lab, node, "get=stats");
    let device = reply.split("public_key=").next().unwrap();
    let value = device.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("no {name}: {device}")).parse().unwrap()
}

/// Datagrams that a node's device dropped for a reason.
pub(crate) fn drops(lab: &Lab, node: &str, reason: &str) -> u64 {
    device_counter(lab, node, &format!("drop_{reason}"))
}

/// The metrics of a node: values by name and labels, as they stand in the text.
pub(crate) fn metrics(lab: &Lab, node: &str) -> BTreeMap<String, f64> {
    let text = lab.host(node).unwrap().run(&["curl", "-sSf", "http://127.0.0.1:9475/metrics"]).unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The one metric with this name and all these labels.
pub(crate) fn metric(metrics: &BTreeMap<String, f64>, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let has = |sample: &str, (label, value): &(&str, &str)| {
        [format!("{{{label}=\"{value}\""), format!(",{label}=\"{value}\"")]
            .iter()
            .any(|part| sample.contains(part))
    };
    let mut found = metrics.iter().filter(|(sample, _)| {
        sample.split('{').next() == Some(name) && labels.iter().all(|label| has(sample, label))
    });
    let value = found.next().map(|(_, value)| *value);
    assert!(found.next().is_none(), "more than one {name} {labels:?}");
    value
}

/// Handshakes of a node with some peers: completed so far, and the time of the last.
pub(crate) fn handshakes(lab: &Lab, node: &str, peers: &[&str]) -> Vec<(String, Option<u64>)> {
    // The agent looks every second or two; the device knows at once.
    let reply = uapi(lab, node, "get=stats");
    let of = |name: &&str| {
        let key = wg(lab, node, "latest-handshakes", name);
        let hex = hex(&public_key(lab, name));
        let section = reply.split("public_key=").find(|section| section.starts_with(&hex));
        let count = section.and_then(|text| text.lines().find_map(|l| l.strip_prefix("handshakes=")));
        (key, count.map(|count| count.parse().unwrap()))
    };
    peers.iter().map(of).collect()
}

/// A key as the UAPI has it.
pub(crate) fn hex(key: &str) -> String {
    key_bytes(key).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a base64 key.
pub(crate) fn key_bytes(key: &str) -> [u8; 32] {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(key).unwrap().try_into().unwrap()
}

/// Nothing was seen in clear. Where a datapath was dead, the kernel may have answered ciphertext by ICMP, quoting it.
pub(crate) fn only_ciphertext(seen: &Seen) {
    assert!(seen.canaries.is_empty(), "{seen:?}");
    assert!(seen.mesh > 0);
    for stranger in &seen.examples {
        assert!(stranger.contains("IP protocol 1,") || stranger.contains("IP protocol 58,"), "{stranger}");
    }
}

/// Sums of several flows, and the longest silence of any.
pub(crate) fn total(counts: &[Count]) -> Count {
    counts.iter().fold(Count::default(), |all, count| Count {
        sent: all.sent + count.sent,
        answered: all.answered + count.answered,
        duplicates: all.duplicates + count.duplicates,
        silence: all.silence.max(count.silence),
    })
}
