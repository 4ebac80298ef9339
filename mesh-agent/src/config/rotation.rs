//! `spec.rotation` of the MeshConfiguration: when keys change.

use std::ops::RangeInclusive;
use std::time::Duration;

use keyservice::rotation::{MAX_EPOCH, Settings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const DAY: Duration = Duration::from_secs(86_400);
/// A rotation takes a few seconds: announcements travel, handshakes complete, what is on its way arrives.
const INTERVALS: RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(3650 * 86_400);
const JITTERS: RangeInclusive<Duration> = Duration::ZERO..=DAY;
const GRACES: RangeInclusive<Duration> = Duration::from_secs(1)..=DAY;
const PATIENCES: RangeInclusive<Duration> = Duration::from_secs(5)..=DAY;

/// When keys change, the same on every node. Durations are as Kubernetes writes them: `30s`, `1h30m`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RotationSpec {
    /// How long a key lives at most; none for no schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "duration"))]
    pub interval: Option<String>,
    /// How long a node waits at most, at random, before it obeys a schedule or a raised `rotationEpoch`.
    #[schemars(extend("format" = "duration"))]
    pub jitter: String,
    /// How long the old key still receives after everyone has left it.
    #[schemars(extend("format" = "duration"))]
    pub grace: String,
    /// For how long a peer that is not heard holds a rotation up.
    #[schemars(extend("format" = "duration"))]
    pub patience: String,
}

impl Default for RotationSpec {
    fn default() -> Self {
        // A session in use has a handshake every 120 s and dies at 180 s: whoever is silent for longer is not there.
        let texts = ["30s", "30s", "3m"].map(str::to_owned);
        let [jitter, grace, patience] = texts;
        Self { interval: None, jitter, grace, patience }
    }
}

impl RotationSpec {
    /// What is wrong with the values: (field below `spec`, message).
    pub fn check(&self, rotation_epoch: u64, errors: &mut Vec<(String, String)>) {
        if rotation_epoch > MAX_EPOCH {
            let message = format!("{rotation_epoch} is larger than {MAX_EPOCH}");
            errors.push(("rotationEpoch".to_owned(), message));
        }
        let interval = self.interval.as_ref().map(|text| within(text, &INTERVALS));
        let fields = [
            ("interval", interval.clone()),
            ("jitter", Some(within(&self.jitter, &JITTERS))),
            ("grace", Some(within(&self.grace, &GRACES))),
            ("patience", Some(within(&self.patience, &PATIENCES))),
        ];
        let mut error = |field: &str, message| errors.push((format!("rotation.{field}"), message));
        for (field, value) in fields {
            if let Some(Err(message)) = value {
                error(field, message);
            }
        }
        if let (Some(Ok(interval)), Ok(jitter)) = (interval, within(&self.jitter, &JITTERS))
            && jitter >= interval
        {
            error("jitter", format!("{} is not shorter than the interval", self.jitter));
        }
    }

    /// For the machine. What [`Self::check`] finds fault with has its default.
    pub fn settings(&self, rotation_epoch: u64) -> Settings {
        let value = |text: &str, default: u64| parse(text).unwrap_or(Duration::from_secs(default));
        Settings {
            rotation_epoch: rotation_epoch.min(MAX_EPOCH),
            interval: self.interval.as_deref().and_then(|text| parse(text).ok()),
            jitter: value(&self.jitter, 30),
            grace: value(&self.grace, 30),
            patience: value(&self.patience, 180),
        }
    }
}

pub(super) fn within(text: &str, range: &RangeInclusive<Duration>) -> Result<Duration, String> {
    let value = parse(text)?;
    match range.contains(&value) {
        true => Ok(value),
        false => Err(format!("{text} is not in {:?}-{:?}", range.start(), range.end())),
    }
}

/// Of `h`, `m`, `s` and `ms`, as Go's `time.ParseDuration` reads it, without a sign.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    // Nine digits of anything cannot overflow, which the library would not survive.
    const DIGITS: usize = 9;
    let bad = || format!("{text:?} is no duration such as 30s, 24h or 1h30m");
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let (mut rest, mut parts) = (text, 0);
    while !rest.is_empty() {
        let number = rest.find(|c| !is_number(c)).ok_or_else(bad)?;
        let unit = rest[number..].find(is_number).map_or(rest.len(), |end| number + end);
        let known = ["h", "m", "s", "ms"].contains(&&rest[number..unit]);
        if !known || !(1..=DIGITS).contains(&number) {
            return Err(bad());
        }
        (rest, parts) = (&rest[unit..], parts + 1);
    }
    if !(1..=4).contains(&parts) {
        return Err(bad());
    }
    text.parse::<kube::core::Duration>().map(Duration::from).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn errors(spec: &RotationSpec, epoch: u64) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        spec.check(epoch, &mut errors);
        errors
    }

    #[test]
    fn durations_are_kubernetes_own() {
        for (text, milliseconds) in [
            ("30s", 30_000),
            ("1h30m", 5_400_000),
            ("1.5s", 1500),
            ("0s", 0),
            ("500ms", 500),
            ("3m", 180_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in
            ["", "30", "-1s", "+1s", "1 h", "1d", "s", "1e9h", "9999999999h", "1.2.3s", "1h1h1h1h1h", "0"]
        {
            assert!(parse(text).unwrap_err().contains("no duration"), "{text}");
        }
    }

    #[test]
    fn the_defaults_are_valid_and_mean_what_they_say() {
        let spec = RotationSpec::default();
        assert_eq!(errors(&spec, 0), []);
        let settings = spec.settings(7);
        let seconds = [settings.jitter, settings.grace, settings.patience].map(|time| time.as_secs());
        assert_eq!((settings.rotation_epoch, settings.interval, seconds), (7, None, [30, 30, 180]));
        let broken = ["x"; 3].map(str::to_owned);
        let [jitter, grace, patience] = broken;
        assert_eq!(RotationSpec { jitter, grace, patience, interval: None }.settings(7), settings);
    }

    #[test]
    fn each_error_names_its_field() {
        let with = |interval: Option<&str>, jitter: &str, grace: &str, patience: &str| RotationSpec {
            interval: interval.map(str::to_owned),
            jitter: jitter.into(),
            grace: grace.into(),
            patience: patience.into(),
        };
        for (spec, epoch, field, word) in [
            (with(Some("1s"), "0s", "1s", "5s"), 0, "rotation.interval", "not in 5s"),
            (with(Some("soon"), "0s", "1s", "5s"), 0, "rotation.interval", "no duration"),
            (with(Some("24h"), "24h", "1s", "5s"), 0, "rotation.jitter", "not shorter than the interval"),
            (with(None, "25h", "1s", "5s"), 0, "rotation.jitter", "not in"),
            (with(None, "1m", "0s", "5s"), 0, "rotation.grace", "not in"),
            (with(None, "1m", "1s", "1s"), 0, "rotation.patience", "not in"),
            (with(None, "1m", "1s", "5s"), 1 << 53, "rotationEpoch", "larger than"),
        ] {
            let found = errors(&spec, epoch);
            let [(at, message)] = found.as_slice() else { panic!("{found:?}") };
            assert!(at == field && message.contains(word), "{at}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_brings_it_down(text in "[0-9.hms]{0,24}|.{0,12}") {
            let _ = parse(&text);
        }
    }
}
