//! One pair of nodes cannot reach each other. It comes back within seconds, and nobody else notices.

use std::time::{Duration, Instant};

use netns_tests::flow::Flow;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::wait;

use crate::support::{
    drops, falls_silent, flow, flows, goes_on, handshakes, metric, metrics, nothing_lost, peer, public_key,
    status, watched, wg,
};

/// A relay from the start: changing from the bridge to it would lose frames.
const RELAYED: &str = "underlay: {delayMs: 0.2}\n";
/// The agent notices after 13 s and tries once more after 6 s (`mesh-agent/src/heal.rs`); the machine may be slow.
const HEALED: Duration = Duration::from_secs(60);

/// The flows and sessions of some nodes with `c`, which nothing may touch.
struct Others<'n> {
    nodes: &'n [&'n str],
    flows: Vec<Flow>,
    handshakes: Vec<Vec<(String, Option<u64>)>>,
}

impl<'n> Others<'n> {
    fn watch(lab: &Lab, nodes: &'n [&'n str]) -> Self {
        let flows = nodes.iter().flat_map(|node| flows(lab, node, "c")).collect();
        Self { nodes, flows, handshakes: Self::look(lab, nodes) }
    }

    fn look(lab: &Lab, nodes: &[&str]) -> Vec<Vec<(String, Option<u64>)>> {
        nodes.iter().map(|node| handshakes(lab, node, &["c"])).collect()
    }

    fn untouched(self, lab: &Lab) {
        assert_eq!(Self::look(lab, self.nodes), self.handshakes, "sessions with c");
        for node in self.nodes {
            assert_eq!(peer(lab, node, "c").heals, 0);
        }
        nothing_lost(self.flows);
    }
}

/// Waits until `node` has tried `name` afresh, and checks that meshctl and the metrics tell it too.
fn is_tried_afresh(lab: &Lab, node: &str, name: &str, tries: u64) {
    wait::until(format!("{node} to try {name} afresh"), HEALED, || {
        let heals = peer(lab, node, name).heals;
        anyhow::ensure!(heals >= tries, "{heals} of {tries}");
        Ok(Some(()))
    })
    .unwrap();
    let host = lab.host(node).unwrap();
    wait::until("meshctl and metrics to tell it", PATIENCE, || {
        let heals = peer(lab, node, name).heals;
        let table = host.run(&["meshctl", "peers", name])?;
        let (header, row) = table.split_once('\n').unwrap();
        // The column, for what is in it may have blanks.
        let told = row.get(header.find("HEALS").unwrap()..).unwrap_or_default().to_owned();
        let told = told.split([' ', ',']).next().unwrap_or_default().to_owned();
        let labels = [("peer", name), ("iface", "margay0")];
        let counted = metric(&metrics(lab, node), "margay_peer_heals_total", &labels);
        anyhow::ensure!(
            told == heals.to_string() && counted == Some(heals as f64),
            "{heals}: {table} {counted:?}"
        );
        Ok(Some(()))
    })
    .unwrap();
}

#[test]
fn a_pair_that_is_broken_one_way_is_tried_until_the_wire_heals() {
    let (mut lab, capture) = watched("abc", RELAYED);
    let others = Others::watch(&lab, &["a", "b"]);
    let ways = [flow(&lab, "a", "b", false), flow(&lab, "b", "a", false)];
    lab.wire_mut().change_one_way("a", "b", |link| link.cut = true).unwrap();
    falls_silent(&ways[0]);
    // b hears nothing of a, though a hears b: it is b who notices.
    is_tried_afresh(&lab, "b", "a", 2);
    wait::until("an issue and a metric of the silence", PATIENCE, || {
        let silent = status(&lab, "b")
            .issues
            .iter()
            .any(|issue| issue.reason == "PeerSilent" && issue.object == "Node/a");
        let for_long = metric(&metrics(&lab, "b"), "margay_peer_silent_seconds", &[("peer", "a")]);
        Ok((silent && for_long.is_some_and(|seconds| seconds >= 10.0)).then_some(()))
    })
    .unwrap();
    lab.wire_mut().change_one_way("a", "b", |link| link.cut = false).unwrap();
    let start = Instant::now();
    for way in &ways {
        goes_on("the pair", way, HEALED);
    }
    println!("back {:?} after the wire", start.elapsed());
    wait::until("the issue to be gone", PATIENCE, || {
        let issues = status(&lab, "b").issues;
        anyhow::ensure!(issues.is_empty(), "{issues:?}");
        Ok(Some(()))
    })
    .unwrap();
    others.untouched(&lab);
    capture.stop().check().unwrap();
}

#[test]
fn a_pair_that_is_broken_one_way_in_one_family_goes_over_to_the_other() {
    let (lab, _capture) = watched("abc", "");
    let others = Others::watch(&lab, &["a", "b"]);
    let ways = [flow(&lab, "a", "b", false), flow(&lab, "b", "a", true)];
    assert_eq!(wg(&lab, "a", "endpoints", "b"), "192.0.2.2:51820");
    // From a to b no IPv4 gets through any more, and that stays so.
    lab.host("b")
        .unwrap()
        .run(&["nft", "table ip broken { chain in { type filter hook input priority -300; ip saddr 192.0.2.1 udp dport 51820 drop; }; }"])
        .unwrap();
    let start = Instant::now();
    falls_silent(&ways[0]);
    for way in &ways {
        goes_on("the pair", way, HEALED);
    }
    println!("over IPv6 after {:?}", start.elapsed());
    is_tried_afresh(&lab, "b", "a", 1);
    assert_eq!(wg(&lab, "b", "endpoints", "a"), "[2001:db8::1]:51820");
    assert_eq!(wg(&lab, "a", "endpoints", "b"), "[2001:db8::2]:51820");
    others.untouched(&lab);
}

#[test]
fn a_stale_session_is_replaced() {
    let (lab, _capture) = watched("abc", "");
    let others = Others::watch(&lab, &["a", "b"]);
    let way = flow(&lab, "a", "b", false);
    let key = public_key(&lab, "a");
    let forget = |more: &str| {
        let host = lab.host("b").unwrap();
        host.run(&["sh", "-c", &format!("wg set margay0 peer {key} remove {more}")]).unwrap();
    };
    // The agent puts the peer back; a, which goes on with the old session, is told at once by a handshake.
    forget("");
    println!("back after {:?}", goes_on("the pair", &way, HEALED));
    assert!(drops(&lab, "b", "unknown_index") > 0);
    // Without its agent and without an endpoint, b cannot tell: a has to notice. Its agent and the datapath's own timer
    // (15 s) are about as fast.
    lab.host("b").unwrap().stop_unit("mesh-agent").unwrap();
    forget(&format!(
        "&& wg set margay0 peer {key} allowed-ips 10.244.1.0/24,fd00:10:244:1::/64,192.0.2.1/32,2001:db8::1/128"
    ));
    let start = Instant::now();
    goes_on("the pair", &way, HEALED);
    println!("noticed after {:?}; {} heals", start.elapsed(), peer(&lab, "a", "b").heals);
    lab.start_agent("b").unwrap();
    lab.settle_node("b", PATIENCE).unwrap();
    others.untouched(&lab);
    let count = way.stop();
    println!("{count:?}");
    assert!(count.silence < HEALED && count.answered > 0);
}

#[test]
fn a_wrong_endpoint_is_left_for_the_right_one() {
    let (lab, _capture) = watched("abc", "");
    // Not b's: what it announces wrongly concerns c too.
    let others = Others::watch(&lab, &["a"]);
    // One way: what b sends by itself would show at once where it is.
    let way = flow(&lab, "a", "b", false);
    let right = "192.0.2.2:51820";
    let is_at = |endpoint: &str| {
        wait::until(format!("b to be at {endpoint}"), HEALED, || {
            let now = wg(&lab, "a", "endpoints", "b");
            anyhow::ensure!(now == endpoint, "is at {now}");
            Ok(Some(()))
        })
        .unwrap();
    };
    is_at(right);
    // Somebody sets it by hand. a's agent (after 19 s) and b's datapath, whose answers are not answered any more (after
    // 15 s), are about as fast. An answer that is under way moves it back at once.
    let [a, b] = ["a", "b"].map(|node| public_key(&lab, node));
    let wrong = "192.0.2.77:9";
    let start = Instant::now();
    wait::until(format!("b to stay at {wrong}"), PATIENCE, || {
        lab.host("a")?.run(&["wg", "set", "margay0", "peer", &b, "endpoint", wrong])?;
        std::thread::sleep(Duration::from_millis(100));
        Ok((wg(&lab, "a", "endpoints", "b") == wrong).then_some(()))
    })
    .unwrap();
    falls_silent(&way);
    goes_on("the pair", &way, HEALED);
    println!("back after {:?}; {} heals", start.elapsed(), peer(&lab, "a", "b").heals);
    is_at(right);
    // b announces one that is wrong, and only then the right one. Neither has a session with the other, and only a has
    // anything to send: nobody but a's agent can find it.
    let tries = peer(&lab, "a", "b").heals;
    let host = lab.host("b").unwrap();
    let config = b"nodeName: b\nendpoints: ['192.0.2.2:9', '192.0.2.2:51820']\n";
    host.write(mesh_api::defaults::CONFIG, config).unwrap();
    host.stop_unit("mesh-agent").unwrap();
    host.run(&["wg", "set", "margay0", "peer", &a, "remove"]).unwrap();
    lab.start_agent("b").unwrap();
    wait::until("a to hear of it", PATIENCE, || {
        let file = format!("{}/nodes/b.margay.yaml", mesh_api::defaults::MANIFESTS);
        let announced = std::fs::read_to_string(lab.host("a")?.path(&file))?;
        Ok(announced.contains("192.0.2.2:9").then_some(()))
    })
    .unwrap();
    lab.agent("a").unwrap().enforced(PATIENCE).unwrap();
    let start = Instant::now();
    lab.host("a").unwrap().run(&["wg", "set", "margay0", "peer", &b, "remove"]).unwrap();
    falls_silent(&way);
    goes_on("the pair", &way, HEALED);
    println!("back after {:?}; {} heals", start.elapsed(), peer(&lab, "a", "b").heals);
    is_at(right);
    is_tried_afresh(&lab, "a", "b", tries + 1);
    others.untouched(&lab);
}
