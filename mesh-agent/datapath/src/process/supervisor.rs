//! A small process that starts the worker again when it crashes. It keeps the TUN open, so that packets wait in its
//! queue, the UAPI's listener, so that clients wait too, and the worker's configuration in memory.
#![allow(unsafe_code)] // fork(2): sound here because no thread exists yet.

use std::io::{self, PipeWriter, Read as _, Write as _};
use std::process::ExitCode;
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

/// Runs `work` in a process of its own, again after each crash, until it ends in order, fails before it was ever
/// ready, or this process is told to end. Must be called before any thread is started; `after` is done here
/// once the first worker has what it needs.
pub fn supervise(mut work: impl FnMut(Ready) -> ExitCode, mut after: impl FnMut()) -> io::Result<ExitCode> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
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
                let code = work(Ready(say));
                return Ok(code);
            }
            ForkResult::Parent { child } => child,
        };
        drop(say);
        after();
        let (status, asked) = wait(worker, &signals)?;
        was_ready |= ready.read(&mut [0]).unwrap_or(0) == 1;
        match status {
            WaitStatus::Exited(_, 0) => return Ok(ExitCode::SUCCESS),
            _ if asked || !was_ready => return Ok(ExitCode::FAILURE),
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
            Ok(signal) => {
                asked = true;
                let _ = kill(worker, signal);
            }
            Err(e) => return Err(e.into()),
        }
        match waitpid(worker, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => {}
            status => return Ok((status, asked)),
        }
    }
}
