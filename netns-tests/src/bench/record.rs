//! Everything that was measured, by metric and contestant, round by round.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::bench::contestant::Contestant;
use crate::bench::stats::Summary;

/// What ratios are to.
pub const BASE: Contestant = Contestant::WireguardGo;

/// Values of one metric.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Series {
    /// What it is measured in.
    pub unit: &'static str,
    /// By round, in order; `None` where it was not measured.
    rounds: BTreeMap<Contestant, Vec<Option<f64>>>,
}

/// All metrics, in the order in which they came.
#[derive(Debug, Clone, Default)]
pub struct Record {
    names: Vec<String>,
    series: BTreeMap<String, Series>,
    /// Round trips of all rounds together, for percentiles.
    samples: BTreeMap<(String, Contestant), Vec<f64>>,
}

impl Record {
    /// Notes a value.
    pub fn add(
        &mut self,
        metric: impl Into<String>,
        unit: &'static str,
        contestant: Contestant,
        round: usize,
        value: f64,
    ) {
        let metric = metric.into();
        if !self.series.contains_key(&metric) {
            self.names.push(metric.clone());
        }
        let series = self.series.entry(metric).or_default();
        series.unit = unit;
        let rounds = series.rounds.entry(contestant).or_default();
        rounds.resize(rounds.len().max(round + 1), None);
        if let Some(place) = rounds.get_mut(round) {
            *place = value.is_finite().then_some(value);
        }
    }

    /// Notes single samples.
    pub fn add_samples(&mut self, metric: impl Into<String>, contestant: Contestant, values: &[f64]) {
        self.samples.entry((metric.into(), contestant)).or_default().extend(values);
    }

    /// All samples so far.
    pub fn samples(&self, metric: &str, contestant: Contestant) -> &[f64] {
        self.samples.get(&(metric.to_owned(), contestant)).map(Vec::as_slice).unwrap_or_default()
    }

    /// A metric's unit.
    pub fn unit(&self, metric: &str) -> &'static str {
        self.series.get(metric).map_or("", |series| series.unit)
    }

    /// Names of metrics, in the order in which they came.
    pub fn metrics(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Values by round.
    pub fn rounds(&self, metric: &str, contestant: Contestant) -> &[Option<f64>] {
        let rounds = self.series.get(metric).and_then(|series| series.rounds.get(&contestant));
        rounds.map(Vec::as_slice).unwrap_or_default()
    }

    /// Over all rounds.
    pub fn summary(&self, metric: &str, contestant: Contestant) -> Option<Summary> {
        let values: Vec<f64> = self.rounds(metric, contestant).iter().copied().flatten().collect();
        Summary::of(&values)
    }

    /// Ratios to another contestant, each within one round.
    pub fn ratio_to(&self, metric: &str, contestant: Contestant, base: Contestant) -> Option<Summary> {
        let pairs = self.rounds(metric, contestant).iter().zip(self.rounds(metric, base));
        let ratios: Vec<f64> = pairs.filter_map(|(value, base)| Some((*value)? / (*base)?)).collect();
        Summary::of(&ratios)
    }

    /// Ratios to [`BASE`].
    pub fn ratio(&self, metric: &str, contestant: Contestant) -> Option<Summary> {
        self.ratio_to(metric, contestant, BASE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut record = Record::default();
        for (round, (ours, theirs)) in [(10.0, 1.0), (3.0, 3.0), (4.0, 2.0)].into_iter().enumerate() {
            record.add("speed", "Mbit/s", Contestant::Margay, round, ours);
            record.add("speed", "Mbit/s", BASE, round, theirs);
        }
        // A round without its counterpart counts for nothing.
        record.add("speed", "Mbit/s", Contestant::Margay, 4, 1000.0);
        let ratio = record.ratio("speed", Contestant::Margay).unwrap();
        assert_eq!((ratio.median, ratio.min, ratio.max), (2.0, 1.0, 10.0));
        assert_eq!(record.summary("speed", Contestant::Margay).unwrap().max, 1000.0);
        assert_eq!(record.rounds("speed", Contestant::Margay).len(), 5);
        assert!(record.ratio("speed", Contestant::Null).is_none());
        assert!(record.ratio("other", Contestant::Margay).is_none());
    }
}
