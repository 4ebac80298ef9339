//! Listeners: one thread that answers probes on sockets in many namespaces.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Socket, Type};

use super::{answer, sctp};
use crate::netns::Netns;
use crate::spec::Protocol;

/// Whose sockets, for [`Server::close`].
pub type Owner = String;

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Connection { stream: TcpStream, got: Vec<u8> },
    Udp(UdpSocket),
    Sctp { socket: Socket, ports: BTreeSet<u16>, at: IpAddr },
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    /// What it answers with.
    name: String,
    kind: Kind,
}

enum Change {
    Open(Entry),
    /// Another SCTP port of an address whose raw socket is open.
    Port(Owner, IpAddr, u16),
    Close(Owner),
    Stop,
}

/// The thread; ends when dropped.
#[derive(Debug)]
pub struct Server {
    changes: Sender<Change>,
    wake: Arc<EventFd>,
    /// What is listened on already.
    at: Mutex<BTreeSet<(Owner, IpAddr, u16, Protocol)>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts with no socket.
    pub fn start() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags).context("eventfd")?);
        let (changes, incoming) = channel();
        let of_thread = Arc::clone(&wake);
        let thread = std::thread::Builder::new()
            .name("listeners".into())
            .spawn(move || serve(&incoming, &of_thread))
            .context("start the listeners")?;
        Ok(Self { changes, wake, at: Mutex::default(), thread: Some(thread) })
    }

    /// Listens at an address of a namespace; doing so twice is fine. `name` is what it answers with.
    pub fn listen(
        &self,
        netns: &Netns,
        owner: &str,
        name: &str,
        address: IpAddr,
        port: u16,
        protocol: Protocol,
    ) -> Result<()> {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if at.contains(&(owner.into(), address, port, protocol)) {
            return Ok(());
        }
        // One raw socket hears all SCTP ports of an address.
        let raw = protocol == Protocol::Sctp
            && at.iter().any(|(of, ip, _, kind)| of == owner && *ip == address && *kind == Protocol::Sctp);
        if raw {
            self.change(Change::Port(owner.into(), address, port))?;
        } else {
            let kind = netns
                .run(|| open(address, port, protocol))?
                .with_context(|| format!("listen on {protocol} {}", SocketAddr::new(address, port)))?;
            self.change(Change::Open(Entry { owner: owner.into(), name: name.into(), kind }))?;
        }
        at.insert((owner.into(), address, port, protocol));
        Ok(())
    }

    /// Closes all sockets of an owner.
    pub fn close(&self, owner: &str) -> Result<()> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).retain(|key| key.0 != owner);
        self.change(Change::Close(owner.into()))
    }

    fn change(&self, change: Change) -> Result<()> {
        self.changes.send(change).ok().context("the listeners' thread has ended")?;
        self.wake.write(1).context("wake the listeners").map(drop)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.change(Change::Stop).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn open(address: IpAddr, port: u16, protocol: Protocol) -> io::Result<Kind> {
    let at = SocketAddr::new(address, port);
    if protocol == Protocol::Sctp {
        let socket = sctp::raw_socket(address)?;
        socket.set_nonblocking(true)?;
        return Ok(Kind::Sctp { socket, ports: BTreeSet::from([port]), at: address });
    }
    let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(at), kind, None)?;
    if protocol == Protocol::Tcp {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&at.into())?;
    socket.set_nonblocking(true)?;
    if protocol == Protocol::Tcp {
        socket.listen(256)?;
        return Ok(Kind::Tcp(socket.into()));
    }
    Ok(Kind::Udp(socket.into()))
}

fn serve(incoming: &Receiver<Change>, wake: &EventFd) {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(entries.iter().map(|entry| PollFd::new(entry.kind.fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::NONE).ok();
        let ready: Vec<bool> = fds.iter().skip(1).map(|fd| fd.any().unwrap_or(false)).collect();
        wake.read().ok();
        let (mut accepted, mut ended) = (Vec::new(), BTreeSet::new());
        for (index, entry) in
            entries.iter_mut().enumerate().filter(|(index, _)| ready.get(*index) == Some(&true))
        {
            match entry.handle() {
                Ok(streams) => accepted.extend(streams.into_iter().map(|stream| Entry {
                    owner: entry.owner.clone(),
                    name: entry.name.clone(),
                    kind: Kind::Connection { stream, got: Vec::new() },
                })),
                // The other end is done, or its namespace went away.
                Err(_) => drop(ended.insert(index)),
            }
        }
        let mut index = 0..;
        entries.retain(|_| !ended.contains(&index.next().unwrap_or_default()));
        entries.extend(accepted);
        while let Ok(change) = incoming.try_recv() {
            match change {
                Change::Open(entry) => entries.push(entry),
                Change::Close(owner) => entries.retain(|entry| entry.owner != owner),
                Change::Stop => return,
                Change::Port(owner, address, port) => entries.iter_mut().for_each(|entry| {
                    if let Kind::Sctp { ports, at, .. } = &mut entry.kind
                        && (&entry.owner, *at) == (&owner, address)
                    {
                        ports.insert(port);
                    }
                }),
            }
        }
    }
}

impl Kind {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Connection { stream, .. } => stream.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
            Self::Sctp { socket, .. } => socket.as_fd(),
        }
    }
}

impl Entry {
    /// Answers what is there; new connections are returned, an error ends a connection.
    fn handle(&mut self) -> io::Result<Vec<TcpStream>> {
        let mut accepted = Vec::new();
        match &mut self.kind {
            Kind::Tcp(listener) => {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    accepted.push(stream);
                }
            }
            Kind::Connection { stream, got } => {
                let mut part = [0; 512];
                let count = stream.read(&mut part)?;
                if count == 0 || got.len() > 4096 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                got.extend(part.get(..count).unwrap_or_default());
                if got.ends_with(b"\n") {
                    let reply = answer(&String::from_utf8_lossy(got), &self.name);
                    got.clear();
                    stream.set_write_timeout(Some(Duration::from_millis(100)))?;
                    stream.write_all(reply.as_bytes())?;
                }
            }
            Kind::Udp(socket) => {
                let mut question = [0; 512];
                while let Ok((count, from)) = socket.recv_from(&mut question) {
                    let question = String::from_utf8_lossy(question.get(..count).unwrap_or_default());
                    socket.send_to(answer(&question, &self.name).as_bytes(), from).ok();
                }
            }
            Kind::Sctp { socket, ports, at } => {
                while let Ok((packet, Some(from))) = sctp::receive(socket) {
                    if let Some(sctp::Message::Init(asked)) =
                        sctp::parse(sctp::payload(&packet, at.is_ipv4()))
                        && ports.contains(&asked.to)
                    {
                        let to = SocketAddr::new(from.ip(), 0);
                        socket.send_to(&sctp::init_ack(asked, rand::random()), &to.into()).ok();
                    }
                }
            }
        }
        Ok(accepted)
    }
}
