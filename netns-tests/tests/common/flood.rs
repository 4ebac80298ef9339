//! Traffic that notices every loss: echo requests that are counted one by one, and a TCP stream whose bytes are compared.
#![allow(unreachable_pub)] // Each test binary has its own.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netns_tests::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(3);

/// What became of a flood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    pub sent: usize,
    /// Numbers of the requests that were not answered.
    pub lost: Vec<usize>,
    /// The longest time between two answers.
    pub silence: Duration,
}

/// Echo requests (RFC 792, RFC 4443) from one namespace to an address, until it is stopped.
pub struct Flood {
    what: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Counted>>,
}

impl Flood {
    /// One request `every`, with `payload` in it.
    pub fn start(from: &Netns, to: IpAddr, every: Duration, payload: &'static [u8]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let socket = from
            .run(|| {
                let (domain, protocol) = match to {
                    IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
                    IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
                };
                let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
                socket.set_recv_buffer_size(4 << 20)?;
                socket.connect(&SocketAddr::new(to, 0).into())?;
                Ok::<_, std::io::Error>(socket)
            })
            .unwrap()
            .unwrap();
        let thread = std::thread::spawn(move || flood(socket, to, every, payload, &ended));
        Self { what: format!("echo requests to {to}"), stop, thread: Some(thread) }
    }

    /// Waits for the last answers and counts.
    pub fn stop(mut self) -> Counted {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }

    /// Every request was answered, and there were at least so many.
    pub fn assert_complete(self, least: usize) -> usize {
        let what = self.what.clone();
        let counted = self.stop();
        assert!(
            counted.lost.is_empty(),
            "{what}: {} of {} lost: {:?}",
            counted.lost.len(),
            counted.sent,
            counted
        );
        assert!(counted.sent >= least, "{what}: only {} were sent", counted.sent);
        counted.sent
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn flood(mut socket: Socket, to: IpAddr, every: Duration, payload: &[u8], stop: &AtomicBool) -> Counted {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let (mut answered, mut silence, mut heard) = (Vec::new(), Duration::ZERO, Instant::now());
    let mut due = Instant::now();
    let mut end = None;
    loop {
        if stop.load(Ordering::SeqCst) {
            let end = *end.get_or_insert_with(|| Instant::now() + LAST);
            if Instant::now() >= end || answered.iter().all(|answer| *answer) {
                break;
            }
        } else if Instant::now() >= due {
            // A request that the kernel refuses is lost like any other.
            let _ = socket.send(&request(to, id, answered.len(), payload));
            answered.push(false);
            due = (due + every).max(Instant::now() - every * 4);
        }
        let wait = if end.is_some() { every } else { due.saturating_duration_since(Instant::now()) };
        socket.set_read_timeout(Some(wait.max(Duration::from_micros(100)))).unwrap();
        let mut buffer = [0u8; 2048];
        match socket.read(&mut buffer) {
            Ok(count) => {
                if let Some(number) = answer(to, id, &buffer[..count])
                    && let Some(answer) = answered.get_mut(number)
                {
                    *answer = true;
                    silence = silence.max(heard.elapsed());
                    heard = Instant::now();
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // An error that an ICMP message told of.
            Err(_) => {}
        }
    }
    let lost = answered.iter().enumerate().filter(|(_, answer)| !**answer).map(|(number, _)| number);
    Counted { sent: answered.len(), lost: lost.collect(), silence }
}

fn request(to: IpAddr, id: u16, number: usize, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    packet.extend_from_slice(&id.to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    // Sequence numbers are short: the whole one comes behind.
    packet.extend_from_slice(&(number as u32).to_be_bytes());
    packet.extend_from_slice(payload);
    if to.is_ipv4() {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The number in an answer of ours.
fn answer(to: IpAddr, id: u16, packet: &[u8]) -> Option<usize> {
    // A raw IPv4 socket gives the IP header too.
    let packet = if to.is_ipv4() { packet.get(usize::from(packet.first()? & 15) * 4..)? } else { packet };
    let kind = if to.is_ipv4() { 0 } else { 129 };
    let ours = packet.first() == Some(&kind) && packet.get(4..6)? == id.to_be_bytes();
    let number = u32::from_be_bytes(packet.get(8..12)?.try_into().ok()?);
    ours.then_some(number as usize)
}

/// RFC 1071.
fn checksum(packet: &[u8]) -> u16 {
    let words =
        packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A TCP stream whose bytes are compared; it must neither break nor stall.
pub struct Stream {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Stream {
    /// From one namespace to `at` in another, about two MB a second.
    pub fn start(from: &Netns, to: &Netns, at: SocketAddr) -> Self {
        let listener = to.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let mut client =
            from.run(|| TcpStream::connect_timeout(&at, Duration::from_secs(20))).unwrap().unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let reader = std::thread::spawn(move || compare(server));
            let mut sent = 0u64;
            while !ended.load(Ordering::SeqCst) {
                let block: Vec<u8> = (0..8192u64).map(|index| ((sent + index) % 251) as u8).collect();
                client.write_all(&block).unwrap();
                sent += block.len() as u64;
                std::thread::sleep(Duration::from_millis(4)); // Paced: the machine has other tests to run.
            }
            drop(client);
            assert_eq!(reader.join().unwrap(), sent);
            sent
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; every byte has arrived. Gives their number.
    pub fn assert_complete(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn compare(mut server: TcpStream) -> u64 {
    let (mut total, mut buffer) = (0u64, [0u8; 65536]);
    loop {
        match server.read(&mut buffer).expect("the stream stalled for five seconds") {
            0 => return total,
            count => {
                for (index, byte) in buffer[..count].iter().enumerate() {
                    assert_eq!(*byte, ((total + index as u64) % 251) as u8);
                }
                total += count as u64;
            }
        }
    }
}
