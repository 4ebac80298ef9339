//! Round trips by ping(8).

use anyhow::{Context, Result, ensure};

use crate::bench::bed::{Side, Tunnel};
use crate::bench::stats;

/// Round trips of one run.
#[derive(Debug, Clone)]
pub struct Trips {
    /// Each, in microseconds.
    pub us: Vec<f64>,
    /// Requests without an answer.
    pub lost: usize,
}

impl Trips {
    /// Mean, in microseconds.
    pub fn average(&self) -> f64 {
        stats::mean(&self.us).unwrap_or(f64::NAN)
    }

    /// What 99 of 100 do not exceed, in microseconds.
    pub fn p99(&self) -> f64 {
        stats::percentile(&self.us, 0.99).unwrap_or(f64::NAN)
    }
}

/// Pings `count` times, every 10 ms, from left to right.
pub fn run(tunnel: &Tunnel<'_>, count: usize) -> Result<Trips> {
    let (to, wanted) = (tunnel.address(Side::Right).to_string(), count.to_string());
    // Some may be lost under load: ping's own verdict does not count.
    let argv = ["ping", "-n", "-i", "0.01", "-W", "1", "-c", &wanted, &to];
    let output = tunnel.bed.host(Side::Left).command(&argv).output().context("run ping")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let us: Vec<f64> = text.lines().filter_map(trip).collect();
    ensure!(!us.is_empty(), "no answer to {count} pings through {}: {text}", tunnel.contestant);
    Ok(Trips { lost: count.saturating_sub(us.len()), us })
}

/// Microseconds, from a line as ping(8) prints it for an answer.
fn trip(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once(" time=")?;
    let ms: f64 = rest.strip_suffix(" ms")?.parse().ok()?;
    Some(ms * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_other_lines_passed_over() {
        assert_eq!(trip("64 bytes from 10.9.0.2: icmp_seq=1 ttl=64 time=0.345 ms"), Some(345.0));
        assert_eq!(trip("64 bytes from 10.9.0.2: icmp_seq=1 ttl=64 time=12 ms"), Some(12_000.0));
        assert_eq!(trip("rtt min/avg/max/mdev = 0.1/0.2/0.3/0.0 ms"), None);
    }
}
