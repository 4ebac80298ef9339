//! `mesh-lab bench`: mesh-datapath beside other userspace WireGuard devices, in one run, and mesh-agent in a large cluster
//! ([`scale`]).
//!
//! Two hosts with a wire between them ([`bed`]); in each round one [`contestant`] after the other drives the tunnel
//! between them, and [`tcp`], [`udp`] and [`ping`] measure it; then [`peers`] measures what a thousand of them cost. Ratios are taken within a round, so that a machine that
//! is slower for a while is so for both sides of them.

pub mod bed;
pub mod contestant;
pub mod cpu;
pub mod goals;
pub mod peers;
pub mod ping;
pub mod record;
pub mod report;
pub mod scale;
pub mod stats;
pub mod tcp;
pub mod udp;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::bench::bed::{Bed, Tunnel};
use crate::bench::contestant::{Contestant, Programs};
use crate::bench::peers::Peers;
use crate::bench::record::Record;
use crate::bench::tcp::{Background, Streams, Transfer};
use crate::bench::udp::Delivery;
use crate::bins::Bins;
use crate::leaks;
use crate::say;
use crate::wait;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// iperf3, 1 and 4 streams, each direction
    Tcp,
    /// 64 bytes at offered rates
    Udp,
    /// Round trips, idle and under a TCP stream
    Ping,
    /// mesh-datapath with 1,000 peers
    Peers,
    /// mesh-agent among 1,000 nodes and 20,000 pods, with a real API server
    Scale,
}

/// How to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Rounds; in each, every contestant once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Two rounds of the shortest runs: to see that it works, not how fast it is
    #[arg(long)]
    pub quick: bool,
    /// Only these contestants (veth, null, margay, margay-ring, wireguard-go, boringtun-cli, gotatun-cli)
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Contestant>,
    /// Not these contestants
    #[arg(long, value_delimiter = ',')]
    pub without: Vec<Contestant>,
    /// Also margay-ring: every packet sealed by itself, by ring
    #[arg(long)]
    pub ring: bool,
    /// Also `other`: this build of mesh-datapath, to see what a change is worth
    #[arg(long, value_name = "PROGRAM")]
    pub other: Option<PathBuf>,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    pub parts: Vec<Part>,
    /// Nodes of the large cluster (part `scale`), besides the real one
    #[arg(long, default_value_t = scale::Size::FULL.nodes, value_parser = clap::value_parser!(u32).range(1..5000))]
    pub nodes: u32,
    /// How many of them have an agent
    #[arg(long, default_value_t = scale::Size::FULL.agents)]
    pub agents: u32,
    /// Where everything goes as JSON
    #[arg(long, default_value = "target/bench.json")]
    pub json: PathBuf,
}

/// How long each thing lasts.
#[derive(Debug, Clone, Copy)]
struct Lengths {
    rounds: u16,
    tcp_s: u32,
    udp: Duration,
    pings: usize,
}

/// Under which conditions it was measured.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Conditions {
    /// Who took part.
    pub contestants: Vec<Contestant>,
    /// Their versions, in the same order.
    pub versions: Vec<String>,
    /// The kernel's release.
    pub kernel: String,
    /// CPUs of this machine.
    pub cpus: usize,
    /// How many rounds.
    pub rounds: u16,
    /// Offered rates: thousands a second with a `k`, or `unlimited`.
    pub offers: Vec<String>,
    /// Share of the machine's time that went to other things, before each round.
    pub busy: Vec<f64>,
    /// How long the bench took, in seconds.
    pub seconds: f64,
}

/// Offered rates in thousands a second; the last is as many as can be.
const OFFERS: [Option<u32>; 7] = [Some(25), Some(50), Some(100), Some(150), Some(200), Some(300), None];
const BUSY: Duration = Duration::from_millis(500);

impl Options {
    fn contestants(&self) -> Vec<Contestant> {
        let wanted = |one: &Contestant| match self.only.is_empty() {
            true => one.is_default(),
            false => self.only.contains(one),
        };
        let wanted = |one: &Contestant| {
            wanted(one)
                || (self.ring && *one == Contestant::MargayRing)
                || (self.other.is_some() && *one == Contestant::Other)
        };
        Contestant::ALL.into_iter().filter(wanted).filter(|one| !self.without.contains(one)).collect()
    }

    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Who names contestants wants to know of them.
    fn has_scale(&self) -> bool {
        if self.parts.is_empty() { self.only.is_empty() } else { self.parts.contains(&Part::Scale) }
    }

    fn size(&self) -> scale::Size {
        let size = if self.quick { scale::Size::QUICK } else { scale::Size::FULL };
        let agents = self.agents.clamp(1, self.nodes);
        scale::Size { nodes: self.nodes, agents, with_pods: size.with_pods.min(agents), ..size }
    }

    fn lengths(&self) -> Lengths {
        match self.quick {
            true => {
                Lengths { rounds: self.rounds.min(2), tcp_s: 1, udp: Duration::from_millis(300), pings: 50 }
            }
            false => Lengths { rounds: self.rounds, tcp_s: 2, udp: Duration::from_secs(1), pings: 200 },
        }
    }
}

fn id(offer: Option<u32>) -> String {
    offer.map_or("unlimited".into(), |kpps| format!("{kpps}k"))
}

/// Measures, and tells. Nothing is left of it, however it ends.
pub fn run(options: &Options, bins: &Bins) -> Result<()> {
    let start = Instant::now();
    if options.parts == [Part::Scale] {
        return run_scale(options, bins);
    }
    let contestants = options.contestants();
    ensure!(!contestants.is_empty(), "no contestant is left");
    let lengths = options.lengths();
    let programs = Programs { bins: bins.clone(), other: options.other.clone() };
    let versions = contestants.iter().map(|one| one.version(&programs)).collect::<Result<Vec<_>>>()?;
    let kernel = Contestant::Veth.version(&programs)?;
    let mut conditions = Conditions {
        contestants,
        versions,
        kernel,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        rounds: lengths.rounds,
        offers: OFFERS.map(id).to_vec(),
        busy: Vec::new(),
        seconds: 0.0,
    };
    let mut record = Record::default();
    let bed = Bed::up(&programs)?;
    let namespaces = bed.namespaces()?;
    tcp::serve(&bed)?;
    let peers = match options.has(Part::Peers) && conditions.contestants.contains(&Contestant::Margay) {
        true => Some(Peers::prepare(&bed, bins)?),
        false => None,
    };
    for round in 0..usize::from(lengths.rounds) {
        let busy = cpu::busy_share(BUSY)?;
        conditions.busy.push(busy);
        // Each round begins with another one, so that nobody is always first.
        let mut order = conditions.contestants.clone();
        order.rotate_left(round % conditions.contestants.len());
        for contestant in order {
            let since = start.elapsed().as_secs();
            eprintln!("[{since:4} s] round {} of {}: {contestant}", round + 1, lengths.rounds);
            let tunnel = bed.start(contestant)?;
            measure(&tunnel, options, lengths, round, &mut record)
                .with_context(|| format!("{contestant}, round {}", round + 1))?;
            tunnel.stop()?;
        }
        if let Some(peers) = &peers {
            let since = start.elapsed().as_secs();
            eprintln!("[{since:4} s] round {} of {}: 1,000 peers", round + 1, lengths.rounds);
            peers.measure(round, lengths.tcp_s, &mut record)?;
        }
    }
    drop(bed);
    let size = options.size();
    let large = options.has_scale().then(|| scale::run(bins, size)).transpose()?;
    conditions.seconds = start.elapsed().as_secs_f64();
    let goals = goals::judge(&record);
    let mut json = report::json(&record, &goals, &conditions);
    if let Some(found) = &large {
        json["scale"] = scale_json(size, found);
    }
    write_json(options, &json)?;
    say!("{}", report::text(&record, &goals, &conditions));
    if let Some(found) = &large {
        say!("\n{}", scale::table::text(size, found));
    }
    say!("\nAll of it: {}. It took {:.0} s.", options.json.display(), conditions.seconds);
    nothing_left(bins, &namespaces)
}

/// mesh-agent in a large cluster: no tunnel is measured, so nobody else takes part.
fn run_scale(options: &Options, bins: &Bins) -> Result<()> {
    let size = options.size();
    let found = scale::run(bins, size)?;
    write_json(options, &serde_json::json!({ "scale": scale_json(size, &found) }))?;
    say!("{}", scale::table::text(size, &found));
    Ok(())
}

fn scale_json(size: scale::Size, found: &scale::Outcome) -> serde_json::Value {
    serde_json::json!({ "size": size, "found": found })
}

fn write_json(options: &Options, value: &serde_json::Value) -> Result<()> {
    let path = &options.json;
    let mut text = serde_json::to_string_pretty(value).context("encode")?;
    text.push('\n');
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn nothing_left(bins: &Bins, namespaces: &[u64]) -> Result<()> {
    wait::until("everything of the bench to be gone", Duration::from_secs(10), || {
        let left = leaks::left(&bins.run, namespaces)?;
        ensure!(left.is_empty(), "{}", left.join("\n  "));
        Ok(Some(()))
    })
}

/// One contestant's turn.
fn measure(
    tunnel: &Tunnel<'_>,
    options: &Options,
    lengths: Lengths,
    round: usize,
    record: &mut Record,
) -> Result<()> {
    tcp::warm_up(tunnel)?;
    if options.has(Part::Ping) {
        measure_ping(tunnel, lengths, round, record)?;
    }
    if options.has(Part::Tcp) {
        for streams in Streams::ALL {
            let transfer = tcp::run(tunnel, streams, lengths.tcp_s)?;
            note_transfer(record, tunnel.contestant, round, streams, &transfer);
        }
    }
    if options.has(Part::Udp) {
        measure_udp(tunnel, lengths, round, record)?;
    }
    Ok(())
}

fn note_transfer(
    record: &mut Record,
    contestant: Contestant,
    round: usize,
    streams: Streams,
    transfer: &Transfer,
) {
    let id = streams.id();
    let mut add = |what: &str, unit, value| {
        record.add(format!("{id}_{what}"), unit, contestant, round, value);
    };
    add("mbit_s", "Mbit/s", transfer.mbit_s);
    if contestant != Contestant::Veth {
        add("daemon_cpu_ms_per_gb", "ms/GB", transfer.per_gb(transfer.usage.daemons));
    }
    add("machine_cpu_ms_per_gb", "ms/GB", transfer.per_gb(transfer.usage.machine));
}

fn measure_ping(tunnel: &Tunnel<'_>, lengths: Lengths, round: usize, record: &mut Record) -> Result<()> {
    let who = tunnel.contestant;
    let idle = ping::run(tunnel, lengths.pings)?;
    // The stream begins before the first ping and ends after the last.
    let seconds = (lengths.pings / 100) as u32 + 2;
    let stream = Background::start(tunnel, seconds)?;
    std::thread::sleep(Duration::from_millis(700));
    let load = ping::run(tunnel, lengths.pings);
    let mbit_s = stream.finish()?;
    for (id, trips) in [("ping_idle", idle), ("ping_load", load?)] {
        record.add(format!("{id}_average_us"), "µs", who, round, trips.average());
        record.add(format!("{id}_p99_us"), "µs", who, round, trips.p99());
        record.add(format!("{id}_lost"), "pings", who, round, trips.lost as f64);
        record.add_samples(id, who, &trips.us);
    }
    record.add("ping_load_tcp_mbit_s", "Mbit/s", who, round, mbit_s);
    Ok(())
}

fn measure_udp(tunnel: &Tunnel<'_>, lengths: Lengths, round: usize, record: &mut Record) -> Result<()> {
    let who = tunnel.contestant;
    let mut received = Vec::new();
    for offer in OFFERS {
        let delivery = udp::run(tunnel, offer, lengths.udp)?;
        received.push(delivery.received_kpps());
        note_delivery(record, who, round, &id(offer), &delivery);
    }
    let peak = received.iter().copied().fold(0.0, f64::max);
    let after = received.iter().skip_while(|kpps| **kpps < peak).copied();
    record.add("udp_peak_kpps", "kpps", who, round, peak);
    record.add("udp_past_peak", "of the peak", who, round, after.fold(peak, f64::min) / peak);
    Ok(())
}

fn note_delivery(
    record: &mut Record,
    contestant: Contestant,
    round: usize,
    offer: &str,
    delivery: &Delivery,
) {
    let mut add = |what: &str, unit, value| {
        record.add(format!("udp_{offer}_{what}"), unit, contestant, round, value);
    };
    add("sent_kpps", "kpps", delivery.offered_kpps());
    add("received_kpps", "kpps", delivery.received_kpps());
    add("loss_percent", "%", delivery.loss_percent());
    add("late", "packets", delivery.late as f64);
    if contestant != Contestant::Veth {
        add("daemon_cpu_us_per_packet", "µs", delivery.daemon_us());
    }
    add("machine_cpu_us_per_packet", "µs", delivery.machine_us());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &[&str]) -> Options {
        Cli::parse_from([&["bench"], arguments].concat()).options
    }

    #[test]
    fn contestants_are_chosen_by_name() {
        let names = |arguments: &[&str]| -> Vec<&str> {
            options(arguments).contestants().into_iter().map(Contestant::name).collect()
        };
        assert_eq!(names(&["--only", "margay,wireguard-go"]), ["margay", "wireguard-go"]);
        assert_eq!(names(&["--only", "margay-ring"]), ["margay-ring"]);
        assert!(!names(&[]).contains(&"margay-ring") && names(&["--ring"]).contains(&"margay-ring"));
        assert!(!names(&["--without", "gotatun-cli,veth"]).contains(&"veth"));
        assert!(Cli::try_parse_from(["bench", "--only", "wireguard"]).is_err());
    }

    #[test]
    fn a_full_bench_has_five_rounds_and_all_parts() {
        let options = options(&[]);
        assert!(options.lengths().rounds >= 5);
        assert!([Part::Tcp, Part::Udp, Part::Ping, Part::Peers].into_iter().all(|part| options.has(part)));
        assert!(options.has_scale());
    }

    #[test]
    fn who_asks_for_contestants_or_other_parts_gets_no_large_cluster() {
        assert!(!options(&["--only", "margay"]).has_scale());
        assert!(!options(&["--parts", "tcp,udp"]).has_scale());
        assert!(options(&["--parts", "tcp,scale"]).has_scale());
    }

    #[test]
    fn no_more_agents_follow_pods_than_there_are() {
        let size = options(&["--nodes", "40", "--agents", "9"]).size();
        assert_eq!((size.nodes, size.agents, size.with_pods), (40, 9, 9));
        assert_eq!(options(&["--nodes", "40"]).size().agents, 40);
    }
}
