//! Probes: does a new connection from here get there? A probe counts only with its nonce echoed.
//!
//! TCP: connect, send a line with the nonce, read it back with the listener's name. UDP: the same in
//! datagrams. SCTP: an INIT answered by an INIT ACK, both by raw sockets, so no SCTP in the kernel is needed.

pub mod sctp;
pub mod server;
mod socket;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::netns::Netns;
use crate::spec::Protocol;

/// How long one attempt waits for its answer.
pub const ATTEMPT: Duration = Duration::from_millis(1000);
/// How long an expected "allowed" is tried again.
pub const PATIENCE: Duration = Duration::from_secs(6);

/// One probe.
#[derive(Debug, Clone)]
pub struct Probe {
    /// Where it starts.
    pub from: Netns,
    /// Its source address.
    pub src: IpAddr,
    /// Its destination.
    pub dst: IpAddr,
    /// Destination port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Name that the listener must answer with (TCP and UDP).
    pub listener: String,
}

/// What became of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The nonce came back.
    Allowed,
    /// Nothing came back in time: silently dropped.
    Dropped,
    /// Somebody said no: RST, ICMP, ABORT, or the local stack had no route.
    Refused(String),
    /// An answer that is not ours.
    Wrong(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Dropped => f.write_str("dropped"),
            Self::Refused(why) => write!(f, "refused ({why})"),
            Self::Wrong(why) => write!(f, "wrong answer ({why})"),
        }
    }
}

impl Probe {
    /// One attempt.
    pub fn attempt(&self, limit: Duration) -> Outcome {
        let nonce: u128 = rand::random();
        let tried = self.from.run(|| match self.protocol {
            Protocol::Tcp => socket::tcp(self, nonce, limit),
            Protocol::Udp => socket::udp(self, nonce, limit),
            Protocol::Sctp => sctp::probe(self, nonce, limit),
        });
        match tried {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Refused(format!("{error:#}")),
        }
    }

    /// Attempts until one gets through or patience ends; the last outcome.
    pub fn persist(&self, patience: Duration) -> Outcome {
        let deadline = Instant::now() + patience;
        loop {
            let outcome = self.attempt(ATTEMPT);
            if outcome == Outcome::Allowed || Instant::now() >= deadline {
                return outcome;
            }
            if matches!(outcome, Outcome::Refused(_)) {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Runs probes at the same time; `persist` says for which a failure is tried again.
pub fn all(probes: &[(Probe, bool)]) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(probes.len());
    // Bounded, so that a case with thousands of probes does not start thousands of threads.
    for batch in probes.chunks(128) {
        let of_batch = std::thread::scope(|scope| {
            let threads: Vec<_> = batch
                .iter()
                .map(|(probe, persist)| {
                    std::thread::Builder::new().stack_size(256 * 1024).spawn_scoped(scope, move || {
                        if *persist { probe.persist(PATIENCE) } else { probe.attempt(ATTEMPT) }
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| match thread.map(|thread| thread.join()) {
                    Ok(Ok(outcome)) => Ok(outcome),
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    Err(error) => Err(error),
                })
                .collect::<std::io::Result<Vec<_>>>()
        })?;
        outcomes.extend(of_batch);
    }
    Ok(outcomes)
}

/// What a client sends: the nonce as a line.
pub(crate) fn question(nonce: u128) -> String {
    format!("margay-probe {nonce:032x}\n")
}

/// What a listener answers.
pub(crate) fn answer(question: &str, listener: &str) -> String {
    format!("{} {listener}\n", question.trim_end())
}
