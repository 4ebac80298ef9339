//! Prometheus metrics, made afresh from what was seen at every scrape: nothing is counted twice and nothing
//! of a peer or pod that is gone is left.
//!
//! Peers go by the names Calico gave them, since dashboards exist; the rest is `margay_*`.

use std::fmt;
use std::sync::Arc;

use ebpf_policy::Counter as Packets;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::cni::Server;
use crate::reconcile::policy::Engine;
use crate::status::Observed;

mod peers;
mod rotation;

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
    peers::peers(&mut page, seen);
    peers::devices(&mut page, seen);
    own_state(&mut page, seen);
    rotation::rotation(&mut page, seen);
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
    use std::time::UNIX_EPOCH;

    use keyservice::PublicKey;
    use mesh_api::status::{KeyStatus, RotationStatus, WaitingPeer};
    use mesh_uapi::{Offload, PeerStats, Stats};

    use super::*;
    use crate::heal::Health;
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
        let stats =
            PeerStats { rx_packets: 3, drops: [("replayed".to_owned(), 2)].into(), ..PeerStats::default() };
        let stats = Stats {
            version: "1".into(),
            core: "mesh-noise".into(),
            crypto: "ring".into(),
            offloads: [("tun_uso".to_owned(), Offload::Refused(22)), ("udp_gso".to_owned(), Offload::On)]
                .into(),
            drops: [("bad_mac".to_owned(), 0)].into(),
            peers: [(PublicKey::from_bytes([2; 32]), stats)].into(),
            ..Stats::default()
        };
        let seen = DeviceSeen { device: Some(device), stats: Some(stats), ..DeviceSeen::default() };
        let health = Health { heals: 4, silent: None };
        let healths = [(("margay0".to_owned(), PublicKey::from_bytes([2; 32])), health)].into();
        let kernel = DeviceSeen { kernel: Some("6.12.1".to_owned()), ..DeviceSeen::default() };
        let devices = [("margay0".to_owned(), seen), ("margay1".to_owned(), kernel)].into();
        board.set_devices(devices, Default::default(), healths);
        board.set_rotation(RotationStatus {
            phase: "moving".to_owned(),
            completed: 3,
            keys: vec![KeyStatus {
                epoch: 5,
                public_key: String::new(),
                device: "margay1".to_owned(),
                port: 51821,
                announced: true,
                preshared: false,
            }],
            waiting: vec![WaitingPeer {
                name: "b".to_owned(),
                reason: "NoHandshake".to_owned(),
                message: String::new(),
            }],
            ..RotationStatus::default()
        });
        let text = text(&board.observed(), &Counted::default()).unwrap();
        let key = PublicKey::from_bytes([2; 32]).to_string();
        let labels = format!(
            "{{hostname=\"\",public_key=\"\",iface=\"margay0\",listen_port=\"51820\",peer_key=\"{key}\",peer_endpoint=\"192.0.2.2:51820\"}}"
        );
        for line in [
            format!("wireguard_bytes_sent{labels} 7"),
            format!("wireguard_bytes_rcvd{labels} 8"),
            format!("wireguard_latest_handshake_seconds{labels} 99"),
            "wireguard_meta{hostname=\"\",public_key=\"\",iface=\"margay0\",listen_port=\"51820\"} 1".to_owned(),
            format!("margay_peer_packets_rcvd_total{{iface=\"margay0\",peer=\"\",peer_key=\"{key}\"}} 3"),
            format!("margay_peer_heals_total{{iface=\"margay0\",peer=\"\",peer_key=\"{key}\"}} 4"),
            format!("margay_peer_drops_total{{iface=\"margay0\",peer=\"\",peer_key=\"{key}\",reason=\"replayed\"}} 2"),
            "margay_datapath_drops_total{iface=\"margay0\",reason=\"bad_mac\"} 0".to_owned(),
            "margay_datapath_info{iface=\"margay0\",version=\"1\",core=\"mesh-noise\",crypto=\"ring\"} 1".to_owned(),
            "margay_datapath_info{iface=\"margay1\",version=\"6.12.1\",core=\"kernel\",crypto=\"\"} 1".to_owned(),
            "margay_datapath_offload{iface=\"margay0\",offload=\"udp_gso\",state=\"on\"} 1".to_owned(),
            "margay_datapath_offload{iface=\"margay0\",offload=\"tun_uso\",state=\"refused: Invalid argument (os error 22)\"} 0"
                .to_owned(),
            "margay_reconciler_failing{reconciler=\"policy\"} 0".to_owned(),
            "margay_rotation_phase{phase=\"moving\"} 1".to_owned(),
            "margay_rotation_phase{phase=\"steady\"} 0".to_owned(),
            "margay_rotation_epoch{iface=\"margay1\"} 5".to_owned(),
            "margay_rotation_waiting_peers{reason=\"NoHandshake\"} 1".to_owned(),
            "margay_rotation_completed_total{} 3".to_owned(),
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
