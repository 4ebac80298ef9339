//! Prometheus metrics, made afresh from what was seen at every scrape: nothing is counted twice and nothing
//! of a peer or pod that is gone is left.
//!
//! Peers go by the names Calico gave them, since dashboards exist; the rest is `margay_*`.

use std::fmt;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use ebpf_policy::Counter as Packets;
use mesh_api::status::PeerState;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::cni::Server;
use crate::reconcile::policy::Engine;
use crate::status::Observed;

type Labels = Vec<(&'static str, String)>;

/// Where the numbers come from, besides the board.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Counts packets.
    pub engine: Option<Arc<Engine>>,
    /// Counts addresses.
    pub cni: Option<Arc<Server>>,
}

/// What is read at a scrape.
#[derive(Debug, Default)]
struct Counted {
    packets: Vec<Packets>,
    events_lost: u64,
    addresses: Option<(usize, Option<u64>)>,
}

impl Metrics {
    /// Everything, as OpenMetrics text.
    pub async fn encode(&self, seen: &Observed) -> Result<String, fmt::Error> {
        let mut counted = Counted::default();
        if let Some(engine) = &self.engine {
            counted.packets = engine.counters().unwrap_or_else(|error| {
                tracing::warn!("policy's counters cannot be read: {error}");
                Vec::new()
            });
            counted.events_lost = engine.events_lost();
        }
        if let Some(cni) = &self.cni {
            counted.addresses = cni.usage().await;
        }
        text(seen, &counted)
    }
}

/// A registry under construction.
#[derive(Default)]
struct Page(Registry);

impl Page {
    fn gauges(&mut self, name: &str, help: &str, values: impl Iterator<Item = (Labels, i64)>) {
        let family = Family::<Labels, Gauge>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    /// The text adds `_total` to the name.
    fn counters(&mut self, name: &str, help: &str, values: impl Iterator<Item = (Labels, u64)>) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// How many of each.
fn tally<'a>(label: &'static str, values: impl Iterator<Item = &'a str>) -> Vec<(Labels, i64)> {
    let mut tally = std::collections::BTreeMap::<&str, i64>::new();
    values.for_each(|value| *tally.entry(value).or_default() += 1);
    tally.into_iter().map(|(value, number)| (vec![(label, value.to_owned())], number)).collect()
}

fn text(seen: &Observed, counted: &Counted) -> Result<String, fmt::Error> {
    let mut page = Page::default();
    peers(&mut page, seen);
    own_state(&mut page, seen);
    packets(&mut page, counted);
    if let Some((used, free)) = counted.addresses {
        let addresses = [("used", Some(used as u64)), ("free", free)];
        let addresses = addresses
            .into_iter()
            .filter_map(|(state, n)| Some((vec![("state", state.to_owned())], count(n?))));
        page.gauges("margay_ipam_addresses", "Pod addresses of this node", addresses);
    }
    let mut text = String::new();
    encode(&mut text, &page.0)?;
    Ok(text)
}

fn peers(page: &mut Page, seen: &Observed) {
    let all: Vec<(Labels, &mesh_uapi::Peer)> = seen
        .devices
        .iter()
        .filter_map(|(name, device)| Some((name, device.device.as_ref()?)))
        .flat_map(|(name, device)| {
            device.peers.iter().map(move |(key, peer)| {
                let own = device.public_key.map(|key| key.to_string()).unwrap_or_default();
                let endpoint = peer.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default();
                let labels = vec![
                    ("hostname", seen.snapshot.local.node_name.clone()),
                    ("public_key", own),
                    ("iface", name.clone()),
                    ("listen_port", device.listen_port.to_string()),
                    ("peer_key", key.to_string()),
                    ("peer_endpoint", endpoint),
                ];
                (labels, peer)
            })
        })
        .collect();
    let of = |value: fn(&mesh_uapi::Peer) -> u64| {
        all.iter().map(move |(labels, peer)| (labels.clone(), count(value(peer))))
    };
    page.gauges("wireguard_bytes_sent", "Bytes sent to a peer", of(|peer| peer.tx_bytes));
    page.gauges("wireguard_bytes_rcvd", "Bytes received from a peer", of(|peer| peer.rx_bytes));
    let handshake = |peer: &mesh_uapi::Peer| {
        let at = peer.last_handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        at.map_or(0, |at| at.as_secs())
    };
    page.gauges(
        "wireguard_latest_handshake_seconds",
        "Unix time of the last handshake with a peer, 0 for never",
        of(handshake),
    );
    let states = seen.peers.values().map(|state| match state {
        PeerState::Up => "up",
        PeerState::Idle => "idle",
        PeerState::Down => "down",
        PeerState::Unknown => "unknown",
    });
    page.gauges("margay_peers", "Peers by state", tally("state", states).into_iter());
    let drops = seen.devices.iter().flat_map(|(name, device)| {
        let drops = device.stats.iter().flat_map(|stats| &stats.drops);
        drops.map(move |(reason, n)| (vec![("device", name.clone()), ("reason", reason.clone())], *n))
    });
    page.counters("margay_datapath_drops", "Packets the datapath dropped", drops);
}

fn own_state(page: &mut Page, seen: &Observed) {
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    page.gauges("margay_build_info", "The agent's version", std::iter::once((version, 1)));
    let generation = seen.generation();
    let stages =
        [("snapshot", generation.snapshot), ("enforced", generation.enforced), ("policy", generation.policy)];
    let stages = stages.into_iter().map(|(stage, n)| (vec![("stage", stage.to_owned())], count(n)));
    page.gauges("margay_generation", "Newest snapshot that got so far", stages);
    let of = |name: &str| vec![("reconciler", name.to_owned())];
    let operations = seen.reconcilers.iter().map(|row| (of(&row.name), row.operations));
    page.counters("margay_reconciler_operations", "Changes made, repairs included", operations);
    let failures = seen.passes.iter().map(|(name, pass)| (of(name), pass.failures));
    page.counters("margay_reconciler_errors", "Passes that left something undone", failures);
    let failing = seen.reconcilers.iter().map(|row| (of(&row.name), i64::from(row.error.is_some())));
    page.gauges("margay_reconciler_failing", "1 while the last pass left something undone", failing);
    let issues = seen.all_issues();
    let reasons = tally("reason", issues.iter().map(|issue| issue.reason.as_str()));
    page.gauges("margay_issues", "What is wrong, by reason", reasons.into_iter());
    let states = tally("policy", seen.endpoint_policy.values().map(String::as_str));
    page.gauges("margay_endpoints", "Local pods by how policy treats them", states.into_iter());
}

fn packets(page: &mut Page, counted: &Counted) {
    let labels = |of: &Packets| {
        let pod = of.pod.as_ref().map(ToString::to_string).unwrap_or_default();
        let verdict = if of.allowed { "allowed" } else { "denied" };
        vec![
            ("endpoint", pod),
            ("ifindex", of.ifindex.to_string()),
            ("direction", of.direction.to_string()),
            ("verdict", verdict.to_owned()),
            ("reason", of.reason.to_owned()),
        ]
    };
    let packets = counted.packets.iter().map(|of| (labels(of), of.packets));
    page.counters("margay_policy_packets", "Packets judged by policy", packets);
    let bytes = counted.packets.iter().map(|of| (labels(of), of.bytes));
    page.counters("margay_policy_bytes", "Bytes judged by policy", bytes);
    let lost = std::iter::once((Vec::new(), counted.events_lost));
    page.counters("margay_policy_events_lost", "Denied packets that no event told of", lost);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use ebpf_policy::model::{Direction, PodRef};
    use keyservice::PublicKey;

    use super::*;
    use crate::status::{Board, DeviceSeen};

    #[test]
    fn peers_have_calicos_names_and_labels() {
        let board = Board::new(&["policy"]);
        let peer = mesh_uapi::Peer {
            endpoint: "192.0.2.2:51820".parse().ok(),
            tx_bytes: 7,
            rx_bytes: 8,
            last_handshake: Some(UNIX_EPOCH + std::time::Duration::from_secs(99)),
            ..Default::default()
        };
        let device = mesh_uapi::Device {
            listen_port: 51820,
            peers: [(PublicKey::from_bytes([2; 32]), peer)].into(),
            ..Default::default()
        };
        let seen = DeviceSeen { device: Some(device), ..DeviceSeen::default() };
        board.set_devices([("margay0".to_owned(), seen)].into(), Default::default());
        let text = text(&board.observed(), &Counted::default()).unwrap();
        let key = PublicKey::from_bytes([2; 32]).to_string();
        let labels = format!(
            "{{hostname=\"\",public_key=\"\",iface=\"margay0\",listen_port=\"51820\",peer_key=\"{key}\",peer_endpoint=\"192.0.2.2:51820\"}}"
        );
        for line in [
            format!("wireguard_bytes_sent{labels} 7"),
            format!("wireguard_bytes_rcvd{labels} 8"),
            format!("wireguard_latest_handshake_seconds{labels} 99"),
            "margay_reconciler_failing{reconciler=\"policy\"} 0".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn drops_are_counted_by_endpoint_and_reason() {
        let counted = Counted {
            packets: vec![Packets {
                ifindex: 4,
                pod: Some(PodRef { namespace: "default".into(), name: "web".into() }),
                direction: Direction::Ingress,
                allowed: false,
                reason: "default_deny",
                packets: 3,
                bytes: 180,
            }],
            events_lost: 2,
            addresses: Some((5, Some(248))),
        };
        let text = text(&Observed::default(), &counted).unwrap();
        for line in [
            "margay_policy_packets_total{endpoint=\"default/web\",ifindex=\"4\",direction=\"ingress\",verdict=\"denied\",reason=\"default_deny\"} 3",
            "margay_policy_events_lost_total{} 2",
            "margay_ipam_addresses{state=\"free\"} 248",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
