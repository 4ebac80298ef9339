//! Many peers in one process, for `mesh-lab bench`: each with a key and a UDP port of its own, on many addresses.
//!
//! `config` prints them for `wg addconf`. `answer` waits for the device under test to begin a handshake with each of
//! them and to send a packet; `initiate` has each of them begin one with the device. Both print `ready` and, once every
//! peer has a session that carried a packet, `done SECONDS COOKIES`, and then stay until standard input ends.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use keyservice::{PrivateKey, PublicKey};
use mesh_noise::message::OVERHEAD;
use mesh_noise::{Datagram, Identity, Keypair, Remote, classify, open_initiation};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Retry of a handshake (REKEY_TIMEOUT, WireGuard paper 6.1).
const RETRY: Duration = Duration::from_secs(5);
/// For all of it.
const LIMIT: Duration = Duration::from_secs(60);
const PORT: u16 = 40_000;

/// Many WireGuard peers in one process.
#[derive(Parser)]
struct Arguments {
    /// How many
    #[arg(long, default_value_t = 1000)]
    count: u32,
    /// How many addresses they share
    #[arg(long, default_value_t = 100)]
    sources: u32,
    /// The first of these addresses
    #[arg(long, default_value = "198.18.0.1")]
    first: Ipv4Addr,
    /// Keys are made from it, the same each time: for measuring only
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The peers for `wg addconf`
    Config,
    /// Wait for the device's handshakes
    Answer {
        /// The device's public key
        key: PublicKey,
    },
    /// Begin handshakes with the device
    Initiate {
        /// The device's public key
        key: PublicKey,
        /// Where it listens
        device: SocketAddr,
    },
}

impl Arguments {
    fn keys(&self) -> impl Iterator<Item = PrivateKey> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        (0..self.count).map(move |_| PrivateKey::generate(&mut rng))
    }

    fn endpoint(&self, number: u32) -> SocketAddrV4 {
        let address = Ipv4Addr::from(u32::from(self.first) + number % self.sources);
        SocketAddrV4::new(address, PORT + (number / self.sources) as u16)
    }

    /// In the tunnel.
    fn inner(number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number)
    }

    fn peers(&self, device: &PublicKey) -> anyhow::Result<Vec<Peer>> {
        self.keys().enumerate().map(|(n, key)| Peer::new(&key, device, self.endpoint(n as u32))).collect()
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match &arguments.verb {
        Verb::Config => {
            for (number, key) in (0..).zip(arguments.keys()) {
                println!(
                    "[Peer]\nPublicKey = {}\nEndpoint = {}\nAllowedIPs = {}/32",
                    key.public(),
                    arguments.endpoint(number),
                    Arguments::inner(number),
                );
            }
            Ok(())
        }
        Verb::Answer { key } => run(arguments.peers(key)?, None),
        Verb::Initiate { key, device } => run(arguments.peers(key)?, Some(*device)),
    }
}

struct Peer {
    identity: Identity,
    remote: Remote,
    socket: UdpSocket,
    session: Option<Keypair>,
    /// A packet went through its session.
    done: bool,
    retry: Instant,
}

impl Peer {
    fn new(key: &PrivateKey, device: &PublicKey, at: SocketAddrV4) -> anyhow::Result<Self> {
        let identity = Identity::new(key);
        let remote = Remote::new(&identity, device, None).context("the device's key")?;
        let socket = UdpSocket::bind(at).with_context(|| format!("bind {at}"))?;
        socket.set_nonblocking(true)?;
        Ok(Self { identity, remote, socket, session: None, done: false, retry: Instant::now() })
    }

    fn initiate(&mut self, device: SocketAddr, rng: &mut StdRng) -> anyhow::Result<()> {
        let now = Instant::now();
        let message = self.remote.initiate(&self.identity, rng.random(), now, SystemTime::now(), rng)?;
        self.socket.send_to(&message, device)?;
        self.retry = now + RETRY + Duration::from_millis(rng.random_range(0..334));
        Ok(())
    }

    /// Takes what came; returns how many cookie replies did.
    fn receive(&mut self, rng: &mut StdRng) -> anyhow::Result<u32> {
        let mut buffer = [0; 2048];
        let mut cookies = 0;
        loop {
            let (length, from) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(cookies),
                Err(e) => return Err(e.into()),
            };
            let datagram = buffer.get_mut(..length).unwrap_or_default();
            match classify(datagram)? {
                Datagram::Initiation(message) => {
                    let opened = open_initiation(&self.identity, message)?;
                    let (index, now) = (rng.random(), Instant::now());
                    let (answer, keypair) = self.remote.respond(&self.identity, opened, index, now, rng)?;
                    self.session = Some(keypair);
                    self.socket.send_to(&answer, from)?;
                }
                Datagram::Response(message) => {
                    let keypair = self.remote.accept_response(&self.identity, message)?;
                    // A keepalive: the device may use the session from then on.
                    let mut keepalive = [0; OVERHEAD];
                    let counter = keypair.sending.reserve(1).context("counter")?;
                    keypair.sending.seal(counter, &mut keepalive);
                    self.socket.send_to(&keepalive, from)?;
                    self.session = Some(keypair);
                    self.done = true;
                }
                Datagram::CookieReply(reply) => {
                    self.remote.accept_cookie(reply, Instant::now())?;
                    cookies += 1;
                }
                Datagram::Data { receiver, counter } => {
                    let session = self.session.as_ref().filter(|session| session.local_index == receiver);
                    let session = session.context("a packet of no session")?;
                    session.receiving.open(counter, datagram).map_err(|e| anyhow::anyhow!("open: {e:?}"))?;
                    self.done = true;
                }
            }
        }
    }
}

/// Until every peer is done. With a device they begin.
fn run(mut peers: Vec<Peer>, device: Option<SocketAddr>) -> anyhow::Result<()> {
    let mut rng = StdRng::from_os_rng();
    let (mut cookies, mut first) = (0, None);
    say("ready")?;
    let begin = Instant::now();
    if let Some(device) = device {
        first = Some(begin);
        for peer in &mut peers {
            peer.initiate(device, &mut rng)?;
        }
    }
    while !peers.iter().all(|peer| peer.done) {
        let ready: Vec<usize> = {
            let mut fds: Vec<PollFd<'_>> =
                peers.iter().map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)).collect();
            poll(&mut fds, PollTimeout::from(20u8))?;
            let ready = fds.iter().enumerate().filter(|(_, fd)| fd.any().unwrap_or(false));
            ready.map(|(number, _)| number).collect()
        };
        for number in ready {
            first.get_or_insert_with(Instant::now);
            let Some(peer) = peers.get_mut(number) else { continue };
            cookies += peer.receive(&mut rng).with_context(|| format!("peer {number}"))?;
        }
        let now = Instant::now();
        if let Some(device) = device {
            for peer in peers.iter_mut().filter(|peer| !peer.done && peer.retry <= now) {
                peer.initiate(device, &mut rng)?;
            }
        }
        if now.duration_since(begin) > LIMIT {
            let open = peers.iter().filter(|peer| !peer.done).count();
            bail!("{open} of {} peers have no session after {LIMIT:?}", peers.len());
        }
    }
    let took = first.unwrap_or(begin).elapsed();
    say(&format!("done {:.3} {cookies}", took.as_secs_f64()))?;
    // Until nobody wants it any more.
    let _ = io::stdin().read(&mut [0]);
    Ok(())
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
