//! What processes and the machine have computed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Ticks a second in /proc/stat (USER_HZ, the same on every architecture that we build for).
const TICKS: u64 = 100;

/// User and system time of whole processes, in nanoseconds: what /proc/PID/stat tells in ticks.
#[derive(Debug)]
pub struct Processes(Vec<ClockId>);

impl Processes {
    /// By their PIDs here. All their threads count, those that ended too.
    pub fn new(pids: &[i32]) -> Result<Self> {
        let clock = |pid: &i32| {
            clock_getcpuclockid(Pid::from_raw(*pid)).with_context(|| format!("CPU clock of process {pid}"))
        };
        pids.iter().map(clock).collect::<Result<_>>().map(Self)
    }

    fn read(&self) -> Result<Duration> {
        let times = self.0.iter().map(|clock| clock_gettime(*clock).map(Duration::from));
        times.sum::<nix::Result<Duration>>().context("a process has ended")
    }
}

/// Of /proc/stat, all CPUs together.
#[derive(Debug, Clone, Copy)]
struct Machine {
    /// User, system and interrupts.
    busy: Duration,
    /// What the hypervisor gave to others.
    stolen: Duration,
}

impl Machine {
    fn read() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        Self::parse(&stat).context("/proc/stat makes no sense")
    }

    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = *ticks.as_slice() else {
            return None;
        };
        let time = |ticks: u64| Duration::from_millis(ticks * (1000 / TICKS));
        // Guests' time is part of user and nice.
        Some(Self { busy: time(user + nice + system + irq + softirq), stolen: time(steal) })
    }
}

/// Clocks at the begin of something.
#[derive(Debug)]
pub struct Meter<'a> {
    processes: &'a Processes,
    at: Instant,
    daemons: Duration,
    machine: Machine,
}

/// What was used since then.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// By the clock on the wall.
    pub wall: Duration,
    /// User and system time of the processes.
    pub daemons: Duration,
    /// Time in which a CPU was not idle, whoever used it.
    pub machine: Duration,
    /// Time that the hypervisor gave to others.
    pub stolen: Duration,
}

impl<'a> Meter<'a> {
    /// Begins.
    pub fn start(processes: &'a Processes) -> Result<Self> {
        let (daemons, machine) = (processes.read()?, Machine::read()?);
        Ok(Self { processes, at: Instant::now(), daemons, machine })
    }

    /// Since the begin.
    pub fn read(&self) -> Result<Usage> {
        let (daemons, machine) = (self.processes.read()?, Machine::read()?);
        Ok(Usage {
            wall: self.at.elapsed(),
            daemons: daemons.saturating_sub(self.daemons),
            machine: machine.busy.saturating_sub(self.machine.busy),
            stolen: machine.stolen.saturating_sub(self.machine.stolen),
        })
    }
}

/// How busy the machine is with other things, 0 to 1, over `lasting` in which we do nothing.
pub fn busy_share(lasting: Duration) -> Result<f64> {
    let none = Processes(Vec::new());
    let meter = Meter::start(&none)?;
    std::thread::sleep(lasting);
    let usage = meter.read()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok((usage.machine + usage.stolen).as_secs_f64() / (usage.wall.as_secs_f64() * cpus as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_time_leaves_idle_and_waiting_out() {
        let machine = Machine::parse("cpu  1 2 3 1000 2000 4 5 6 0 0\ncpu0 1 1\n").unwrap();
        assert_eq!(machine.busy, Duration::from_millis(150));
        assert_eq!(machine.stolen, Duration::from_millis(60));
        assert!(Machine::parse("cpu  1 2").is_none() && Machine::parse("").is_none());
    }

    #[test]
    fn a_process_that_works_has_used_about_what_passed() {
        let me = Processes::new(&[std::process::id() as i32]).unwrap();
        let meter = Meter::start(&me).unwrap();
        while meter.read().unwrap().daemons < Duration::from_millis(20) {}
        let usage = meter.read().unwrap();
        assert!(usage.wall * 64 > usage.daemons, "{usage:?}");
        // More than any process has (PID_MAX_LIMIT).
        assert!(Processes::new(&[(4 << 20) + 1]).is_err());
    }
}
