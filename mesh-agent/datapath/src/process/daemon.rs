//! Into the background, once the device answers.
#![allow(unsafe_code)] // fork(2): sound here because no thread exists yet.

use std::fs::OpenOptions;
use std::io::{self, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd;

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

/// Waits for the daemon to be ready.
#[derive(Debug)]
pub struct Parent {
    pipe: PipeWriter,
    keep_output: bool,
}

impl Parent {
    /// Lets go of the terminal (of its output only without `keep_output`) and lets the parent end with
    /// success. Until here, what goes wrong is seen there.
    pub fn ready(mut self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(null.as_fd())?;
        if !self.keep_output {
            dup2_stdout(null.as_fd())?;
            dup2_stderr(null.as_fd())?;
        }
        self.pipe.write_all(&[1])
    }
}

/// Forks: the child goes on as a session of its own; the parent waits for [`Parent::ready`] and exits with 0,
/// or with 1 when the child ends before. Must be called before any thread is started.
pub fn daemonize(keep_output: bool) -> io::Result<Parent> {
    let (mut reader, pipe) = io::pipe()?;
    // SAFETY: the process has one thread, so the child inherits no lock that nobody releases.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(pipe);
            let ready = reader.read(&mut [0]).unwrap_or(0) == 1;
            std::process::exit(i32::from(!ready));
        }
        ForkResult::Child => {
            drop(reader);
            setsid()?;
            std::env::set_current_dir("/")?;
            Ok(Parent { pipe, keep_output })
        }
    }
}
