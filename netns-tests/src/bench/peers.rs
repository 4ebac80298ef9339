//! One peer against a thousand: CPU, memory, cold handshakes and look-ups of mesh-datapath.
//!
//! The thousand are the example `many_peers` of mesh-datapath on the right host: real handshakes, from 100 addresses.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::bed::{Bed, INTERFACE, Keys, PORT, Side};
use crate::bench::contestant::Contestant;
use crate::bench::record::Record;
use crate::bench::tcp::{self, Streams};
use crate::bins::Bins;
use crate::host::checked;

/// How many.
pub const COUNT: u32 = 1000;
/// From how many addresses.
const SOURCES: u32 = 100;
/// The first of these addresses, and the first in the tunnel; as in `many_peers`.
const FIRST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const INNER: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);

const OURS: Contestant = Contestant::Margay;
const FILE: &str = "/run/bench/peers.conf";

/// What is measured of many peers.
#[derive(Debug)]
pub struct Peers<'a> {
    bed: &'a Bed,
    helper: String,
    lookup: PathBuf,
    config: Vec<u8>,
}

impl<'a> Peers<'a> {
    /// Gives the right host the peers' addresses.
    pub fn prepare(bed: &'a Bed, bins: &Bins) -> Result<Self> {
        let helper = bins.program("examples/many_peers")?;
        let lookup = bins.program("examples/allowed_ips_lookup")?;
        let config = Command::new(&helper).args(["--count", &COUNT.to_string()]).arg("config").output();
        let config = checked("many_peers config", config.context("run many_peers")?)?.into_bytes();
        let addresses: Vec<String> = (0..SOURCES)
            .map(|n| format!("addr add {}/32 dev wire", Ipv4Addr::from(u32::from(FIRST) + n)))
            .collect();
        bed.right.netns().ip(&addresses)?;
        bed.left.netns().ip(&["route add 198.18.0.0/16 dev wire".into()])?;
        Ok(Self { bed, helper: helper.to_string_lossy().into_owned(), lookup, config })
    }

    /// One round of everything.
    pub fn measure(&self, round: usize, seconds: u32, record: &mut Record) -> Result<()> {
        self.answer(round, record).context("handshakes with 1,000 peers")?;
        self.initiate(round, record).context("handshakes of 1,000 peers")?;
        self.cpu(round, seconds, record).context("CPU with 1,000 peers")?;
        self.look_up(round, record)
    }

    fn add_peers(&self, side: Side) -> Result<()> {
        let host = self.bed.host(side);
        host.write(FILE, &self.config)?;
        host.run(&["wg", "addconf", INTERFACE, FILE]).map(drop)
    }

    /// A daemon on the left without peers; its public key and PID.
    fn device(&self) -> Result<(String, i32)> {
        let keys = Keys::generate()?;
        let pid = self.bed.start_daemon(Side::Left, OURS, &keys)?.context("no daemon")?;
        self.bed.left.netns().ip(&[format!("route add 10.128.0.0/16 dev {INTERFACE}")])?;
        Ok((keys.public, pid))
    }

    /// The device begins a handshake with each, by a packet to each; memory before and after.
    fn answer(&self, round: usize, record: &mut Record) -> Result<()> {
        let (public, pid) = self.device()?;
        let before = resident_kib(pid)?;
        self.add_peers(Side::Left)?;
        let mut helper = Helper::start(self, &["answer", &public])?;
        helper.wait_for("ready")?;
        let begin = Instant::now();
        self.bed.left.netns().run(send_to_each)?.context("send to each peer")?;
        helper.wait_for("done")?;
        let took = begin.elapsed();
        let after = resident_kib(pid)?;
        drop(helper);
        self.bed.stop()?;
        record.add("peers_1000_handshakes_begun_s", "s", OURS, round, took.as_secs_f64());
        let each = (after - before) / f64::from(COUNT);
        record.add("peers_memory_kib_each", "KiB", OURS, round, each);
        Ok(())
    }

    /// Each begins a handshake with the device.
    fn initiate(&self, round: usize, record: &mut Record) -> Result<()> {
        let (public, _) = self.device()?;
        self.add_peers(Side::Left)?;
        let device = format!("{}:{PORT}", Side::Left.outer());
        let mut helper = Helper::start(self, &["initiate", &public, &device])?;
        let words = helper.wait_for("done")?;
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<f64>().ok());
        let (seconds, cookies) = number(1).zip(number(2)).context("many_peers makes no sense")?;
        drop(helper);
        self.bed.stop()?;
        record.add("peers_1000_handshakes_answered_s", "s", OURS, round, seconds);
        record.add("peers_1000_cookies", "cookies", OURS, round, cookies);
        Ok(())
    }

    /// A TCP stream between two devices that know one peer, and two that know 1,000.
    fn cpu(&self, round: usize, seconds: u32, record: &mut Record) -> Result<()> {
        let mut costs = [0.0; 2];
        let mut order = [0, 1];
        order.rotate_left(round % 2);
        for which in order {
            let tunnel = self.bed.start(OURS)?;
            if which == 1 {
                self.add_peers(Side::Left)?;
                self.add_peers(Side::Right)?;
            }
            tcp::warm_up(&tunnel)?;
            let transfer = tcp::run(&tunnel, Streams { count: 1, reverse: false }, seconds)?;
            tunnel.stop()?;
            if let Some(cost) = costs.get_mut(which) {
                *cost = transfer.per_gb(transfer.usage.daemons);
            }
        }
        let [one, many] = costs;
        record.add("peers_1_daemon_cpu_ms_per_gb", "ms/GB", OURS, round, one);
        record.add("peers_1000_daemon_cpu_ms_per_gb", "ms/GB", OURS, round, many);
        record.add("peers_1000_to_1_cpu", "×", OURS, round, many / one);
        Ok(())
    }

    fn look_up(&self, round: usize, record: &mut Record) -> Result<()> {
        let output = Command::new(&self.lookup).output().context("run allowed_ips_lookup")?;
        for line in checked("allowed_ips_lookup", output)?.lines() {
            let (prefixes, ns) = line.split_once(' ').context("two numbers")?;
            let metric = format!("allowed_ips_{prefixes}_lookup_ns");
            record.add(metric, "ns", OURS, round, ns.parse().context("nanoseconds")?);
        }
        Ok(())
    }
}

fn send_to_each() -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    for number in 0..COUNT {
        let to = Ipv4Addr::from(u32::from(INNER) + number);
        socket.send_to(b"hello", (to, 9))?;
        // The interface's queue holds 500.
        if number % 100 == 99 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn resident_kib(pid: i32) -> Result<f64> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).context("read the daemon's status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().context("VmRSS")
}

/// `many_peers` on the right host. It ends with its standard input.
struct Helper {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Helper {
    fn start(peers: &Peers<'_>, verb: &[&str]) -> Result<Self> {
        let (count, sources) = (COUNT.to_string(), SOURCES.to_string());
        let mut argv = vec![peers.helper.as_str(), "--count", &count, "--sources", &sources];
        argv.extend(verb);
        let mut command = peers.bed.host(Side::Right).command(&argv);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("many_peers")?;
        let out = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, out })
    }

    /// Waits for a line that begins so; its words.
    fn wait_for(&mut self, word: &str) -> Result<Vec<String>> {
        loop {
            let mut line = String::new();
            if self.out.read_line(&mut line).context("read from many_peers")? == 0 {
                bail!("many_peers ended before it was {word}");
            }
            let words: Vec<String> = line.split_whitespace().map(String::from).collect();
            if words.first().is_some_and(|first| first == word) {
                return Ok(words);
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().ok();
    }
}
