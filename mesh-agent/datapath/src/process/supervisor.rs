//! A small process that starts the worker again when it crashes. It keeps the TUN open, so that packets wait in its
//! queue, the UAPI's listener, so that clients wait too, and the worker's configuration in memory. On SIGHUP it becomes the
//! program that is on the disk by then, and takes the device over from the worker.
#![allow(unsafe_code)] // fork(2): sound here because no thread exists yet.

use std::io::{self, PipeWriter, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

/// Pause before a worker that crashed is started again, and the longest it grows to when they crash in a row.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A worker that lived as long did not crash in a row.
const STABLE: Duration = Duration::from_secs(5);

/// How a worker says that it serves.
#[derive(Debug)]
pub struct Ready(PipeWriter);

impl Ready {
    /// From now on its end is a crash.
    pub fn say(mut self) {
        let _ = self.0.write_all(&[1]);
    }
}

/// How a supervised device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// We were told to.
    Asked,
    /// In order and of itself: it was passed on, or its interface or socket was removed.
    InOrder,
    /// Before it was ever ready, or while it was told to end.
    Failed,
}

/// Runs `work`, which is true if it ended in order, in a process of its own; again after each crash, until it ends in order,
/// fails before it was ever ready, or this process is told to end. Must be called before any thread is started; `after` is done here
/// once the first worker has what it needs.
pub fn supervise(mut work: impl FnMut(Ready) -> bool, mut after: impl FnMut()) -> io::Result<End> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let mut pause = PAUSE;
    let mut was_ready = false;
    loop {
        let (mut ready, say) = io::pipe()?;
        let started = Instant::now();
        let own = nix::unistd::getpid();
        // SAFETY: the process has one thread, so the child inherits no lock that nobody releases.
        let worker = match unsafe { fork() }? {
            ForkResult::Child => {
                drop(ready);
                // Without us nobody would start it again, and two could then have the device.
                set_pdeathsig(Signal::SIGKILL)?;
                if getppid() != own {
                    std::process::exit(1);
                }
                signals.thread_unblock()?;
                // What comes after is the parent's to do.
                std::process::exit(i32::from(!work(Ready(say))));
            }
            ForkResult::Parent { child } => child,
        };
        drop(say);
        after();
        let (status, asked) = wait(worker, &signals)?;
        was_ready |= ready.read(&mut [0]).unwrap_or(0) == 1;
        match status {
            WaitStatus::Exited(_, 0) => return Ok(if asked { End::Asked } else { End::InOrder }),
            _ if asked || !was_ready => return Ok(End::Failed),
            status => tracing::error!("the worker crashed and is started again: {status:?}"),
        }
        if started.elapsed() >= STABLE {
            pause = PAUSE;
        }
        std::thread::sleep(pause);
        pause = (pause * 4).min(LONGEST_PAUSE);
    }
}

/// Waits for the worker's end, passing on what ends us; true if that was why.
fn wait(worker: Pid, signals: &SigSet) -> io::Result<(WaitStatus, bool)> {
    let mut asked = false;
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) | Err(Errno::EINTR) => {}
            Ok(Signal::SIGHUP) => tracing::error!("no upgrade, this one goes on: {}", upgrade()),
            Ok(signal) => {
                asked = true;
                let _ = kill(worker, signal);
            }
            Err(e) => return Err(e.into()),
        }
        // One of ours from before an upgrade may end too.
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => break,
                status if status.pid() == Some(worker) => return Ok((status, asked)),
                _ => {}
            }
        }
    }
}

/// Becomes the program that is now on the disk, which takes the device over from our worker; returns why not. The
/// process stays the same one, for whoever watches it.
fn upgrade() -> io::Error {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    // The link of a program that was replaced ends in " (deleted)".
    let program = match name.as_encoded_bytes().contains(&b'/') {
        true => PathBuf::from(&name),
        false => match std::env::current_exe() {
            Ok(path) => path.to_string_lossy().trim_end_matches(" (deleted)").into(),
            Err(e) => return e,
        },
    };
    // Once it has taken our place there is no way back, so it is to show first that it runs.
    match Command::new(&program).arg("--version").stdout(Stdio::null()).status() {
        Ok(status) if status.success() => {}
        Ok(status) => return io::Error::other(format!("{}: {status}", program.display())),
        Err(e) => return e,
    }
    let replace = std::env::args_os().any(|argument| argument == "--replace");
    let more = (!replace).then_some("--replace");
    Command::new(&program).arg0(&name).args(more).args(arguments).exec()
}
