//! The holder: init of a host. Makes the namespaces, reaps zombies, keeps units running as systemd would,
//! and ends (taking the whole host with it) when the lab's end of its control socket closes.
#![allow(unsafe_code)] // fork, before any thread exists.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, sethostname};
use serde::{Deserialize, Serialize};

/// How long a unit that ended stays down (systemd's default RestartSec).
const RESTART_AFTER: Duration = Duration::from_millis(100);

/// A line to the holder.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Start a unit and keep it running. Its output goes to /var/log/margay/NAME.log.
    Start {
        /// Unit name.
        name: String,
        /// Program and arguments.
        argv: Vec<String>,
        /// PATH for it and its children.
        path: String,
    },
    /// End a unit for good (SIGTERM; SIGKILL if `now`).
    Stop {
        /// Unit name.
        name: String,
        /// Do not ask it.
        now: bool,
    },
    /// Send a signal to a unit; it is restarted if it ends.
    Kill {
        /// Unit name.
        name: String,
        /// Signal number.
        signal: i32,
    },
    /// How is a unit?
    Query {
        /// Unit name.
        name: String,
    },
}

/// A line from the holder.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    /// First line, from the outer process: the init's PID as the lab sees it.
    Pid(i32),
    /// Namespaces and mounts are there.
    Ready,
    /// Could not be done.
    Failed(String),
    /// State of the unit asked about.
    Unit {
        /// PID inside the host, while it runs.
        pid: Option<i32>,
        /// How often it was started anew.
        restarts: u32,
    },
}

struct Unit {
    argv: Vec<String>,
    path: String,
    pid: Option<i32>,
    restarts: u32,
    wanted: bool,
    /// When to start it again.
    due: Option<Instant>,
}

/// `mesh-lab holder NAME`, with the control socket as standard input.
pub fn main(name: &str) -> Result<()> {
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().context("control socket")?);
    let kinds = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    if let Err(error) = unshare(kinds) {
        say(&control, &Reply::Failed(format!("make namespaces (root is needed): {error}")))?;
        bail!(error);
    }
    // SAFETY: no thread has been started in this process.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => {
            say(&control, &Reply::Pid(child.as_raw()))?;
            drop(control);
            waitpid(child, None).context("wait for the host's init")?;
            Ok(())
        }
        ForkResult::Child => {
            sethostname(name).context("set host name")?;
            if let Err(error) = crate::mounts::make_private() {
                say(&control, &Reply::Failed(format!("{error:#}")))?;
                bail!(error);
            }
            Init::run(control)
        }
    }
}

fn say(mut control: &UnixStream, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_string(reply).context("encode reply")?;
    line.push('\n');
    control.write_all(line.as_bytes()).context("write to the lab")
}

struct Init {
    units: BTreeMap<String, Unit>,
}

impl Init {
    fn run(control: UnixStream) -> Result<()> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().context("block SIGCHLD")?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("signalfd for SIGCHLD")?;
        let mut lines = BufReader::new(control.try_clone().context("control socket")?);
        let mut init = Self { units: BTreeMap::new() };
        say(&control, &Reply::Ready)?;
        loop {
            let now = Instant::now();
            let next = init.units.values().filter_map(|unit| unit.due).min();
            let timeout = match next {
                Some(due) => PollTimeout::try_from(due.saturating_duration_since(now).as_millis() + 1)
                    .unwrap_or(PollTimeout::MAX),
                None => PollTimeout::NONE,
            };
            let mut fds = [
                PollFd::new(control.as_fd(), PollFlags::POLLIN),
                PollFd::new(children.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => bail!("poll: {error}"),
            }
            let asked = fds[0].any().unwrap_or(false);
            while let Ok(Some(_)) = children.read_signal() {}
            init.reap();
            init.restart_due();
            if asked {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap_or(0) == 0 {
                    return Ok(()); // The lab is gone; the kernel takes the rest with its init.
                }
                let reply = match serde_json::from_str(&line) {
                    Ok(request) => init.answer(request).unwrap_or_else(|e| Reply::Failed(format!("{e:#}"))),
                    Err(error) => Reply::Failed(format!("request: {error}")),
                };
                say(&control, &reply)?;
            }
        }
    }

    fn answer(&mut self, request: Request) -> Result<Reply> {
        let name = match request {
            Request::Start { name, argv, path } => {
                if self.units.get(&name).is_some_and(|unit| unit.pid.is_some()) {
                    bail!("unit {name} already runs");
                }
                let pid = spawn(&name, &argv, &path)?;
                let unit = Unit { argv, path, pid: Some(pid), restarts: 0, wanted: true, due: None };
                self.units.insert(name.clone(), unit);
                name
            }
            Request::Stop { name, now } => {
                let unit = self.unit(&name)?;
                unit.wanted = false;
                unit.due = None;
                if let Some(pid) = unit.pid {
                    let signal = if now { Signal::SIGKILL } else { Signal::SIGTERM };
                    kill(Pid::from_raw(pid), signal).context("signal the unit")?;
                }
                name
            }
            Request::Kill { name, signal } => {
                if let Some(pid) = self.unit(&name)?.pid {
                    let signal = Signal::try_from(signal).context("signal number")?;
                    kill(Pid::from_raw(pid), signal).context("signal the unit")?;
                }
                name
            }
            Request::Query { name } => name,
        };
        let unit = self.unit(&name)?;
        Ok(Reply::Unit { pid: unit.pid, restarts: unit.restarts })
    }

    fn unit(&mut self, name: &str) -> Result<&mut Unit> {
        self.units.get_mut(name).with_context(|| format!("no unit {name}"))
    }

    fn reap(&mut self) {
        loop {
            let pid = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid.as_raw(),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            for unit in self.units.values_mut().filter(|unit| unit.pid == Some(pid)) {
                unit.pid = None;
                unit.due = unit.wanted.then(|| Instant::now() + RESTART_AFTER);
            }
        }
    }

    fn restart_due(&mut self) {
        let now = Instant::now();
        for (name, unit) in &mut self.units {
            if unit.due.is_some_and(|due| due <= now) {
                unit.restarts += 1;
                match spawn(name, &unit.argv, &unit.path) {
                    Ok(pid) => (unit.pid, unit.due) = (Some(pid), None),
                    Err(_) => unit.due = Some(now + Duration::from_secs(1)),
                }
            }
        }
    }
}

fn spawn(name: &str, argv: &[String], path: &str) -> Result<i32> {
    let log = format!("/var/log/margay/{name}.log");
    let log: File =
        OpenOptions::new().create(true).append(true).open(&log).with_context(|| format!("open {log}"))?;
    let (program, arguments) = argv.split_first().context("empty command")?;
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path).current_dir("/");
    command.stdin(Stdio::null()).stdout(log.try_clone().context("log")?).stderr(log);
    unblock_signals(&mut command);
    let child = command.spawn().with_context(|| format!("start {program}"))?;
    // Reaped with every other orphan in `reap`, so the handle is not needed.
    i32::try_from(child.id()).context("process id")
}

/// The init blocks SIGCHLD for its signalfd; what it starts must not inherit that.
fn unblock_signals(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: sigprocmask is async-signal-safe.
    unsafe {
        command.pre_exec(|| SigSet::empty().thread_set_mask().map_err(std::io::Error::from));
    }
}
