//! What mesh-datapath is to reach, and whether it does: information, never a failure.

use serde::Serialize;

use crate::bench::contestant::Contestant;
use crate::bench::record::{BASE, Record};
use crate::bench::stats::{Summary, percentile};
use crate::bench::tcp::Streams;

/// Offered rate at which loss and CPU per packet are judged, in thousands a second.
pub const JUDGED_KPPS: u32 = 100;

/// What a look-up may cost with 10,000 prefixes to be called flat: a table that large is not in the fastest cache.
const FLAT: f64 = 3.0;

/// A goal and what was found.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// What is judged.
    pub what: String,
    /// At most (or at least) this.
    pub goal: f64,
    /// Whether more is better.
    pub at_least: bool,
    /// The figure that counts.
    pub got: f64,
    /// Its spread over rounds, where there is one.
    pub spread: Option<Summary>,
    /// In words: ratio to whom, or the unit.
    pub unit: &'static str,
}

impl Goal {
    /// Whether it is reached.
    pub fn is_met(&self) -> bool {
        if self.at_least { self.got >= self.goal } else { self.got <= self.goal }
    }

    /// By how much it falls short, in percent of the goal.
    pub fn short_percent(&self) -> f64 {
        let off = if self.at_least { self.goal - self.got } else { self.got - self.goal };
        100.0 * off / self.goal
    }
}

const TO_GO: &str = "× wireguard-go";

/// Judges what was measured; goals without figures are left out.
pub fn judge(record: &Record) -> Vec<Goal> {
    let ours = Contestant::Margay;
    let mut goals = Vec::new();
    let mut add = |what: String, at_least, goal, unit, summary: Option<Summary>| {
        if let Some(summary) = summary {
            goals.push(Goal { what, goal, at_least, got: summary.median, spread: Some(summary), unit });
        }
    };
    for streams in Streams::ALL {
        let id = streams.id();
        let name = id.replace("tcp", "TCP ").replace('_', " ");
        add(name.clone(), true, 2.0, TO_GO, record.ratio(&format!("{id}_mbit_s"), ours));
        let cpu = record.ratio(&format!("{id}_daemon_cpu_ms_per_gb"), ours);
        add(format!("{name}, daemons' CPU per GB"), false, 0.45, TO_GO, cpu);
    }
    let udp = format!("udp_{JUDGED_KPPS}k");
    let name = format!("UDP 64 B at {JUDGED_KPPS} kpps");
    let loss = record.summary(&format!("{udp}_loss_percent"), ours);
    add(format!("{name}, loss"), false, 2.0, "%", loss);
    let cpu = record.ratio(&format!("{udp}_daemon_cpu_us_per_packet"), ours);
    add(format!("{name}, daemons' CPU per packet"), false, 0.2, TO_GO, cpu);
    let past = record.summary("udp_past_peak", ours);
    add("UDP 64 B, goodput past its peak".into(), true, 0.9, "of the peak", past);
    for (id, name) in [("ping_idle", "ping idle"), ("ping_load", "ping under a TCP stream")] {
        let average = record.ratio(&format!("{id}_average_us"), ours);
        add(format!("{name}, average"), false, 0.5, TO_GO, average);
    }
    for (metric, name, goal, unit) in [
        ("peers_1000_to_1_cpu", "1,000 peers, daemons' CPU per GB", 1.05, "× one peer's"),
        ("peers_memory_kib_each", "1,000 peers, memory of each", 16.0, "KiB"),
        ("peers_1000_handshakes_begun_s", "1,000 peers, cold handshakes begun by us", 10.0, "s"),
        ("peers_1000_handshakes_answered_s", "1,000 peers, cold handshakes begun by them", 10.0, "s"),
    ] {
        add(name.into(), false, goal, unit, record.summary(metric, ours));
    }
    let [one, most] = [1, 10_000].map(|prefixes| format!("allowed_ips_{prefixes}_lookup_ns"));
    if let Some((one, most)) = record.summary(&one, ours).zip(record.summary(&most, ours)) {
        goals.push(Goal {
            what: "look-up with 10,000 prefixes, caches cold".into(),
            goal: FLAT,
            at_least: false,
            got: most.median / one.median,
            spread: None,
            unit: "× that with one",
        });
    }
    goals.extend(lowest_p99(record, ours));
    goals
}

/// Its p99 under load against the lowest of all other tunnels with crypto, over all samples.
fn lowest_p99(record: &Record, ours: Contestant) -> Option<Goal> {
    let p99 = |who| percentile(record.samples("ping_load", who), 0.99);
    let others = [BASE, Contestant::Boringtun, Contestant::Gotatun];
    let lowest = others.into_iter().filter_map(p99).min_by(f64::total_cmp)?;
    Some(Goal {
        what: "ping under a TCP stream, p99 of all samples".into(),
        goal: 1.0,
        at_least: false,
        got: p99(ours)? / lowest,
        spread: None,
        unit: "× the lowest of the others",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_on_its_right_side() {
        let goal =
            |at_least, goal, got| Goal { what: String::new(), goal, at_least, got, spread: None, unit: "" };
        assert!(goal(true, 2.0, 2.0).is_met() && !goal(true, 2.0, 1.9).is_met());
        assert!(goal(false, 0.5, 0.5).is_met() && !goal(false, 0.5, 0.6).is_met());
        assert!((goal(true, 2.0, 1.5).short_percent() - 25.0).abs() < 1e-9);
        assert!((goal(false, 0.5, 0.6).short_percent() - 20.0).abs() < 1e-9);
    }

    #[test]
    fn only_what_was_measured_is_judged() {
        assert!(judge(&Record::default()).is_empty());
        let mut record = Record::default();
        record.add("udp_100k_loss_percent", "%", Contestant::Margay, 0, 3.0);
        record.add_samples("ping_load", Contestant::Margay, &[5.0]);
        record.add_samples("ping_load", Contestant::Gotatun, &[4.0]);
        record.add_samples("ping_load", BASE, &[8.0]);
        let goals = judge(&record);
        let got: Vec<_> = goals.iter().map(|goal| (goal.got, goal.is_met())).collect();
        assert_eq!(got, [(3.0, false), (1.25, false)]);
    }
}
