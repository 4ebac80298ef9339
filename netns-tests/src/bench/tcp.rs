//! TCP by iperf3: how much arrives, and what it costs.

use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bench::bed::{Bed, Side, Tunnel};
use crate::bench::cpu::{Meter, Usage};
use crate::wait;

const SERVER: &str = "iperf3";
/// The server needs a moment between two tests.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// Connections at once.
    pub count: u8,
    /// From right to left (`iperf3 -R`).
    pub reverse: bool,
}

impl Streams {
    /// What `make bench` measures.
    pub const ALL: [Self; 4] = [
        Self { count: 1, reverse: false },
        Self { count: 1, reverse: true },
        Self { count: 4, reverse: false },
        Self { count: 4, reverse: true },
    ];

    /// In a metric's name.
    pub fn id(self) -> String {
        format!("tcp{}_{}", self.count, if self.reverse { "reverse" } else { "forward" })
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// As received, in megabits (10^6) a second.
    pub mbit_s: f64,
    /// Bytes received.
    pub bytes: f64,
    /// CPU time from begin to end.
    pub usage: Usage,
}

impl Transfer {
    /// Milliseconds of a CPU for 10^9 bytes received.
    pub fn per_gb(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e3 / (self.bytes / 1e9)
    }
}

/// Starts the server, which stays.
pub fn serve(bed: &Bed) -> Result<()> {
    bed.host(Side::Right).start_unit(SERVER, &["iperf3", "-s"])
}

/// Sends for whole seconds through a tunnel.
pub fn run(tunnel: &Tunnel<'_>, streams: Streams, seconds: u32) -> Result<Transfer> {
    let mut busy = String::new();
    wait::until("iperf3's server", PATIENCE, || {
        let meter = Meter::start(&tunnel.daemons)?;
        let output = start(tunnel, streams, &["-t", &seconds.to_string()])?.wait_with_output()?;
        let usage = meter.read()?;
        match received(&output)? {
            Ok((mbit_s, bytes)) => Ok(Some(Transfer { mbit_s, bytes, usage })),
            Err(why) => {
                busy.clone_from(&why);
                bail!(why)
            }
        }
    })
    .with_context(|| format!("{} TCP through {}", streams.id(), tunnel.contestant))
}

/// Sends some megabytes, so that what comes next finds everything warm.
pub fn warm_up(tunnel: &Tunnel<'_>) -> Result<()> {
    wait::until("iperf3's server", PATIENCE, || {
        let streams = Streams { count: 1, reverse: false };
        let output = start(tunnel, streams, &["-n", "16M"])?.wait_with_output()?;
        received(&output)?.map(Some).map_err(anyhow::Error::msg)
    })
    .map(drop)
    .with_context(|| format!("warm up {}", tunnel.contestant))
}

/// Starts a client.
fn start(tunnel: &Tunnel<'_>, streams: Streams, how_much: &[&str]) -> Result<Child> {
    let to = tunnel.address(Side::Right).to_string();
    let count = streams.count.to_string();
    let mut argv = vec!["iperf3", "-J", "-c", &to, "-P", &count];
    argv.extend(how_much);
    if streams.reverse {
        argv.push("-R");
    }
    let mut command = tunnel.bed.host(Side::Left).command(&argv);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("start iperf3")
}

/// A stream in the background, for other things to be measured beside it.
#[derive(Debug)]
pub struct Background(Child);

impl Background {
    /// Starts one stream from left to right.
    pub fn start(tunnel: &Tunnel<'_>, seconds: u32) -> Result<Self> {
        let streams = Streams { count: 1, reverse: false };
        start(tunnel, streams, &["-t", &seconds.to_string()]).map(Self)
    }

    /// Waits for its end; megabits a second as received.
    pub fn finish(self) -> Result<f64> {
        let output = self.0.wait_with_output().context("wait for iperf3")?;
        let (mbit_s, _) = received(&output)?.map_err(anyhow::Error::msg)?;
        Ok(mbit_s)
    }
}

/// Megabits a second and bytes from iperf3's JSON; the inner error is what iperf3 complains of.
fn received(output: &Output) -> Result<Result<(f64, f64), String>> {
    let text = String::from_utf8_lossy(&output.stdout);
    let json: Value = serde_json::from_str(&text)
        .with_context(|| format!("iperf3 said {text:?} {}", String::from_utf8_lossy(&output.stderr)))?;
    if let Some(error) = json.get("error") {
        return Ok(Err(format!("iperf3: {error}")));
    }
    let sum = json.pointer("/end/sum_received");
    let number = |name| sum.and_then(|sum| sum.get(name)).and_then(Value::as_f64);
    let (rate, bytes) = number("bits_per_second").zip(number("bytes")).context("iperf3 gave no sum")?;
    Ok(match bytes > 0.0 {
        true => Ok((rate / 1e6, bytes)),
        false => Err("iperf3: nothing arrived".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn output(stdout: &str) -> Output {
        let status = std::process::ExitStatus::from_raw(0);
        Output { status, stdout: stdout.into(), stderr: Vec::new() }
    }

    #[test]
    fn iperf3_is_believed_only_with_a_sum_of_what_arrived() {
        let good = r#"{"end": {"sum_received": {"bytes": 5e8, "bits_per_second": 2e9}}}"#;
        assert_eq!(received(&output(good)).unwrap(), Ok((2000.0, 5e8)));
        let busy = r#"{"end": {}, "error": "the server is busy"}"#;
        assert!(received(&output(busy)).unwrap().unwrap_err().contains("busy"));
        let nothing = r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#;
        assert!(received(&output(nothing)).unwrap().is_err());
        assert!(received(&output("{}")).is_err() && received(&output("no json")).is_err());
    }
}
