//! SIGTERM and SIGINT end the device in order.

use std::sync::mpsc::Sender;
use std::{io, thread};

use nix::sys::signal::{SigSet, Signal};

use crate::engine::Exit;

/// Sends the first signal's name through `exit`. Must be called before any other thread is started: the
/// mask that keeps signals for this one is inherited.
pub fn watch(exit: Sender<Exit>) -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            match set.wait() {
                Ok(signal) => {
                    let _ = exit.send(Exit::Signal(signal.as_str()));
                    return;
                }
                Err(e) => tracing::warn!("sigwait: {e}"),
            }
        }
    })?;
    Ok(())
}
