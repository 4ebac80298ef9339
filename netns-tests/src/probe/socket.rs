//! TCP and UDP attempts, in the current network namespace.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::{Outcome, Probe, answer, question};

fn bound(probe: &Probe, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(probe.dst, 0)), kind, None)?;
    socket.bind(&SocketAddr::new(probe.src, 0).into())?;
    Ok(socket)
}

fn verdict(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Outcome::Dropped,
        _ => Outcome::Refused(error.to_string()),
    }
}

fn compare(probe: &Probe, nonce: u128, got: &[u8]) -> Outcome {
    let want = answer(&question(nonce), &probe.listener);
    if got == want.as_bytes() {
        Outcome::Allowed
    } else {
        Outcome::Wrong(format!("{:?} instead of {want:?}", String::from_utf8_lossy(got)))
    }
}

pub(super) fn tcp(probe: &Probe, nonce: u128, limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    let exchange = || -> io::Result<Vec<u8>> {
        let socket = bound(probe, Type::STREAM)?;
        socket.connect_timeout(&SocketAddr::new(probe.dst, probe.port).into(), limit)?;
        // Thousands of probes must not leave thousands of ports in TIME_WAIT: close by RST, after the answer.
        socket.set_linger(Some(Duration::ZERO))?;
        let mut stream = TcpStream::from(socket);
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(200));
        stream.set_read_timeout(Some(left))?;
        stream.write_all(question(nonce).as_bytes())?;
        let mut got = Vec::new();
        let mut part = [0; 256];
        while !got.ends_with(b"\n") {
            let count = stream.read(&mut part)?;
            if count == 0 {
                break;
            }
            got.extend(part.get(..count).unwrap_or_default());
        }
        Ok(got)
    };
    match exchange() {
        Ok(got) => compare(probe, nonce, &got),
        Err(error) => verdict(&error),
    }
}

pub(super) fn udp(probe: &Probe, nonce: u128, limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    let exchange = || -> io::Result<Vec<u8>> {
        let socket = UdpSocket::from(bound(probe, Type::DGRAM)?);
        socket.connect(SocketAddr::new(probe.dst, probe.port))?;
        let mut got = [0; 512];
        // Three datagrams: a single lost one must not look like a verdict.
        let step = limit / 3;
        loop {
            socket.send(question(nonce).as_bytes())?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            socket.set_read_timeout(Some(step.min(left)))?;
            match socket.recv(&mut got) {
                Ok(count) => return Ok(got.get(..count).unwrap_or_default().to_vec()),
                Err(error) if verdict(&error) == Outcome::Dropped => {}
                Err(error) => return Err(error),
            }
        }
    };
    match exchange() {
        Ok(got) => compare(probe, nonce, &got),
        Err(error) => verdict(&error),
    }
}
