//! Small datagrams at an offered rate: a generator that keeps time, and a sink that counts.
#![allow(unsafe_code)] // sendmmsg and recvmmsg with headers that are made once: nix makes them for every call.

use std::io;
use std::mem::zeroed;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl;
use nix::sys::socket::{setsockopt, sockopt};

use crate::bench::bed::{Side, Tunnel};
use crate::bench::cpu::{Meter, Usage};

/// Payload of a datagram, in bytes.
pub const PAYLOAD: usize = 64;
/// Datagrams of one system call.
const BATCH: usize = 64;
/// How often the generator looks what is due.
const TICK: Duration = Duration::from_micros(100);
/// Datagrams that it makes up for at once after it had to wait. More is forgiven: it was not offered then.
const DEBT: u64 = 128;
/// Bytes of the sink's buffer, so that it loses nothing where it has to wait for a CPU.
const BUFFER: usize = 64 << 20;
/// Silence after which nothing more comes.
const SILENCE: Duration = Duration::from_millis(200);

/// What came of an offered rate.
#[derive(Debug, Clone, Copy)]
pub struct Delivery {
    /// Datagrams that the generator sent, in `lasting`.
    pub sent: u64,
    /// Those that arrived at all.
    pub received: u64,
    /// Those that arrived before the generator ended.
    pub in_time: u64,
    /// Those that came after a later one.
    pub late: u64,
    /// How long the generator sent.
    pub lasting: Duration,
    /// CPU time from begin to the last datagram.
    pub usage: Usage,
}

impl Delivery {
    /// Thousands a second that were sent.
    pub fn offered_kpps(&self) -> f64 {
        self.sent as f64 / self.lasting.as_secs_f64() / 1e3
    }

    /// Thousands a second that arrived meanwhile.
    pub fn received_kpps(&self) -> f64 {
        self.in_time as f64 / self.lasting.as_secs_f64() / 1e3
    }

    /// Of what was sent, in percent.
    pub fn loss_percent(&self) -> f64 {
        100.0 * (1.0 - self.received as f64 / self.sent as f64)
    }

    /// Microseconds of the daemons' CPU time for each datagram that arrived.
    pub fn daemon_us(&self) -> f64 {
        self.usage.daemons.as_secs_f64() * 1e6 / self.received as f64
    }

    /// Microseconds of the machine's CPU time for each datagram that arrived.
    pub fn machine_us(&self) -> f64 {
        self.usage.machine.as_secs_f64() * 1e6 / self.received as f64
    }
}

/// Offers `kpps` thousand datagrams a second (as many as can be without) from left to right.
pub fn run(tunnel: &Tunnel<'_>, kpps: Option<u32>, lasting: Duration) -> Result<Delivery> {
    let to = tunnel.bed.host(Side::Right).netns();
    let sink = to.run(|| UdpSocket::bind((tunnel.address(Side::Right), 0)))?.context("bind the sink")?;
    setsockopt(&sink, sockopt::RcvBufForce, &BUFFER).context("SO_RCVBUFFORCE")?;
    sink.set_read_timeout(Some(Duration::from_millis(20))).context("time-out")?;
    let port = sink.local_addr().context("the sink's port")?.port();
    let at = SocketAddrV4::new(tunnel.address(Side::Right), port);
    let from = tunnel.bed.host(Side::Left).netns();
    let generator = from
        .run(|| UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| socket.connect(at).map(|()| socket)))?
        .context("connect the generator")?;

    let meter = Meter::start(&tunnel.daemons)?;
    let over = AtomicBool::new(false);
    let (sent, got) = std::thread::scope(|scope| {
        let sink = scope.spawn(|| count(&sink, &over));
        let sent = generate(&generator, kpps, lasting);
        over.store(true, Ordering::SeqCst);
        let got = sink.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (sent, got)
    });
    let ((sent, took), got) = (sent.context("send")?, got.context("receive")?);
    ensure!(got.received > 0, "none of {sent} datagrams came through {}", tunnel.contestant);
    let usage = meter.read()?;
    let Count { received, in_time, late } = got;
    Ok(Delivery { sent, received, in_time, late, lasting: took, usage })
}

/// Sends and returns how many and for how long.
fn generate(socket: &UdpSocket, kpps: Option<u32>, lasting: Duration) -> io::Result<(u64, Duration)> {
    let mut payloads = [[0u8; PAYLOAD]; BATCH];
    let mut batch = Batch::new(&mut payloads);
    // Else a sleep may last 50 microseconds longer.
    prctl::set_timerslack(1)?;
    let start = Instant::now();
    let mut pace = Pace::new(kpps);
    let mut sent = 0;
    loop {
        let elapsed = start.elapsed();
        if elapsed >= lasting {
            return Ok((sent, elapsed));
        }
        match pace.due(elapsed) {
            0 => {
                let ticks = elapsed.as_nanos() / TICK.as_nanos() + 1;
                let next = TICK * u32::try_from(ticks).unwrap_or(u32::MAX);
                std::thread::sleep(next.saturating_sub(start.elapsed()));
            }
            due => {
                let done = batch.send(socket, sent, due.min(BATCH as u64) as usize)? as u64;
                pace.scheduled += done;
                sent += done;
            }
        }
    }
}

/// How many datagrams should have been sent by when.
struct Pace {
    kpps: Option<u32>,
    /// Sent or forgiven.
    scheduled: u64,
}

impl Pace {
    fn new(kpps: Option<u32>) -> Self {
        Self { kpps, scheduled: 0 }
    }

    /// How many now.
    fn due(&mut self, elapsed: Duration) -> u64 {
        let Some(kpps) = self.kpps else { return BATCH as u64 };
        let target = elapsed.as_micros() as u64 * u64::from(kpps) / 1000;
        self.scheduled = self.scheduled.max(target.saturating_sub(DEBT));
        target - self.scheduled.min(target)
    }
}

/// Message headers for [`BATCH`] datagrams.
struct Batch<'a> {
    payloads: &'a mut [[u8; PAYLOAD]; BATCH],
    vectors: Box<[libc::iovec; BATCH]>,
    headers: Box<[libc::mmsghdr; BATCH]>,
}

impl<'a> Batch<'a> {
    fn new(payloads: &'a mut [[u8; PAYLOAD]; BATCH]) -> Self {
        // SAFETY: both are plain data, for which all zeros are a value.
        let (mut vectors, mut headers) = unsafe {
            (Box::new(zeroed::<[libc::iovec; BATCH]>()), Box::new(zeroed::<[libc::mmsghdr; BATCH]>()))
        };
        for ((vector, header), payload) in vectors.iter_mut().zip(headers.iter_mut()).zip(payloads.iter_mut())
        {
            *vector = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: PAYLOAD };
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
        }
        Self { payloads, vectors, headers }
    }

    /// Sends `count` datagrams, numbered from `first` on; returns how many were.
    fn send(&mut self, socket: &UdpSocket, first: u64, count: usize) -> io::Result<usize> {
        for (payload, number) in self.payloads.iter_mut().zip(first..).take(count) {
            if let Some(place) = payload.first_chunk_mut() {
                *place = number.to_le_bytes();
            }
        }
        let count = count.min(self.vectors.len()) as libc::c_uint;
        // SAFETY: the first `count` headers point to vectors and payloads that `self` keeps alive and in place.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count, 0) };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                // No room now: what could not be sent was not offered.
                e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR)) => Ok(0),
                e => Err(e),
            },
        }
    }

    /// Waits for datagrams; returns how many came, none when the socket's time-out was over.
    fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        let (headers, flags) = (self.headers.as_mut_ptr(), libc::MSG_WAITFORONE as _);
        // SAFETY: the headers point to vectors and payloads that `self` keeps alive and in place.
        let received = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers, BATCH as libc::c_uint, flags, std::ptr::null_mut())
        };
        match usize::try_from(received) {
            Ok(received) => Ok(received),
            Err(_) => match io::Error::last_os_error() {
                e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(0),
                e => Err(e),
            },
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    received: u64,
    in_time: u64,
    late: u64,
}

/// Counts until it is over and nothing comes any more.
fn count(socket: &UdpSocket, over: &AtomicBool) -> io::Result<Count> {
    let mut payloads = [[0u8; PAYLOAD]; BATCH];
    let mut batch = Batch::new(&mut payloads);
    let mut count = Count::default();
    let mut next = 0;
    let mut last = Instant::now();
    loop {
        let received = batch.receive(socket)?;
        let is_over = over.load(Ordering::SeqCst);
        if received > 0 {
            last = Instant::now();
        } else if is_over && last.elapsed() > SILENCE {
            return Ok(count);
        }
        count.received += received as u64;
        count.in_time += if is_over { 0 } else { received as u64 };
        for payload in batch.payloads.iter().take(received) {
            let number = payload.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            count.late += u64::from(number < next);
            next = next.max(number + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_and_old_debt_forgiven() {
        let mut pace = Pace::new(Some(100));
        assert_eq!(pace.due(Duration::from_micros(100)), 10);
        pace.scheduled += 10;
        assert_eq!(pace.due(Duration::from_micros(100)), 0);
        assert_eq!(pace.due(Duration::from_micros(150)), 5);
        assert_eq!(pace.due(Duration::from_secs(1)), DEBT);
        pace.scheduled += DEBT;
        assert_eq!(pace.due(Duration::from_secs(1)), 0);
        assert_eq!(Pace::new(None).due(Duration::ZERO), BATCH as u64);
    }

    #[test]
    fn what_is_sent_is_counted_with_what_came_late() {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        sink.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(sink.local_addr().unwrap()).unwrap();
        let mut payloads = [[0u8; PAYLOAD]; BATCH];
        let mut batch = Batch::new(&mut payloads);
        for first in [0, 20, 10] {
            assert_eq!(batch.send(&socket, first, 10).unwrap(), 10);
        }
        let count = count(&sink, &AtomicBool::new(true)).unwrap();
        assert_eq!(count, Count { received: 30, in_time: 0, late: 10 });
    }

    #[test]
    fn a_generator_reaches_a_low_rate() {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(sink.local_addr().unwrap()).unwrap();
        let (sent, took) = generate(&socket, Some(5), Duration::from_millis(200)).unwrap();
        let kpps = sent as f64 / took.as_secs_f64() / 1e3;
        assert!((0.5..=5.1).contains(&kpps), "{kpps} kpps of 5");
    }
}
