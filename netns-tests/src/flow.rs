//! A flow of small UDP datagrams there and back at a steady pace, in which each is counted and every silence is measured.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// What every datagram begins with: a canary for captures.
pub const CANARY: &[u8] = b"margay-flow";
/// How often threads look whether they are to end.
const TURN: Duration = Duration::from_millis(50);
/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(2);

/// What became of a flow's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Sent, or refused by the sender's own kernel.
    pub sent: u64,
    /// Those whose answer came, each once.
    pub answered: u64,
    /// Answers that came again.
    pub duplicates: u64,
    /// The longest time without an answer.
    pub silence: Duration,
}

impl Count {
    /// Sent and never answered.
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

#[derive(Debug)]
struct Shared {
    /// No more is sent.
    enough: AtomicBool,
    /// No answer is waited for any more.
    end: AtomicBool,
    sent: AtomicU64,
    heard: Mutex<Heard>,
}

#[derive(Debug)]
struct Heard {
    answered: u64,
    duplicates: u64,
    seen: Vec<bool>,
    last: Instant,
    silence: Duration,
}

/// A running flow; ends when dropped.
#[derive(Debug)]
pub struct Flow {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    /// Starts sending a datagram each `every` from an address in one namespace to an address in another, which sends
    /// each back.
    pub fn start(from: (&Netns, IpAddr), to: (&Netns, IpAddr), every: Duration) -> Result<Self> {
        let bind = |(netns, ip): (&Netns, IpAddr)| -> Result<UdpSocket> {
            let socket = netns.run(|| UdpSocket::bind(SocketAddr::new(ip, 0)))?;
            let socket = socket.with_context(|| format!("bind to {ip}"))?;
            socket.set_read_timeout(Some(TURN)).context("set a time-out")?;
            Ok(socket)
        };
        let (near, far) = (bind(from)?, bind(to)?);
        let at = far.local_addr().context("own address")?;
        let heard = Heard {
            answered: 0,
            duplicates: 0,
            seen: Vec::new(),
            last: Instant::now(),
            silence: Duration::ZERO,
        };
        let shared = Arc::new(Shared {
            enough: AtomicBool::new(false),
            end: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            heard: Mutex::new(heard),
        });
        let sender = near.try_clone().context("second handle")?;
        let mut flow = Self { shared, threads: Vec::new() };
        flow.spawn("flow-echo", move |shared| echo(shared, &far))?;
        flow.spawn("flow-answers", move |shared| answers(shared, &near))?;
        flow.spawn("flow-sender", move |shared| send(shared, &sender, at, every))?;
        Ok(flow)
    }

    fn spawn(&mut self, name: &str, job: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || job(&shared));
        self.threads.push(thread.context("start a thread")?);
        Ok(())
    }

    /// The count so far; what is on its way counts as lost.
    pub fn count(&self) -> Count {
        let heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        Count {
            sent: self.shared.sent.load(Ordering::SeqCst),
            answered: heard.answered,
            duplicates: heard.duplicates,
            silence: heard.silence.max(heard.last.elapsed()),
        }
    }

    /// Sends no more, waits for the last answers, and gives the count.
    pub fn stop(mut self) -> Count {
        self.shared.enough.store(true, Ordering::SeqCst);
        // The sender is the last one that was started.
        if let Some(sender) = self.threads.pop() {
            sender.join().ok();
        }
        let count = self.count();
        let start = Instant::now();
        while self.count().lost() > 0 && start.elapsed() < LAST {
            std::thread::sleep(Duration::from_millis(5));
        }
        Count { silence: count.silence, ..self.count() }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.shared.enough.store(true, Ordering::SeqCst);
        self.shared.end.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// Waits for a datagram; `None` once the flow is at its end. Errors that ICMP left on the socket are no end.
fn receive(shared: &Shared, socket: &UdpSocket, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
    while !shared.end.load(Ordering::SeqCst) {
        match socket.recv_from(buffer) {
            Ok(received) => return Some(received),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    None
}

fn echo(shared: &Shared, socket: &UdpSocket) {
    let mut buffer = [0; 64];
    while let Some((length, from)) = receive(shared, socket, &mut buffer) {
        socket.send_to(buffer.get(..length).unwrap_or_default(), from).ok();
    }
}

fn answers(shared: &Shared, socket: &UdpSocket) {
    let mut buffer = [0; 64];
    while let Some((length, _)) = receive(shared, socket, &mut buffer) {
        let number = buffer.get(..length).and_then(|bytes| bytes.strip_prefix(CANARY));
        let number = number.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let Some(number) = number.filter(|number| *number < shared.sent.load(Ordering::SeqCst)) else {
            continue;
        };
        let mut heard = shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(number).unwrap_or_default();
        if heard.seen.len() <= place {
            heard.seen.resize(place + 1, false);
        }
        match heard.seen.get_mut(place) {
            Some(seen) if !*seen => {
                *seen = true;
                heard.answered += 1;
                heard.silence = heard.silence.max(heard.last.elapsed());
                heard.last = Instant::now();
            }
            _ => heard.duplicates += 1,
        }
    }
}

fn send(shared: &Shared, socket: &UdpSocket, to: SocketAddr, every: Duration) {
    let mut due = Instant::now();
    while !shared.enough.load(Ordering::SeqCst) {
        let number = shared.sent.fetch_add(1, Ordering::SeqCst);
        socket.send_to(&[CANARY, &number.to_be_bytes()].concat(), to).ok();
        due += every;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}
