//! A man in the middle: forwards datagrams between two addresses, remembers them, and can send any others.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use super::{DEADLINE, Host};

enum Order {
    Send(Vec<u8>),
    /// Goes on from another port, as after a NAT's reboot.
    Rebind(mpsc::Sender<u16>),
}

/// Stands on a host between the device there and the one beyond the wire.
pub struct Relay {
    pub port: u16,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    orders: mpsc::Sender<Order>,
}

impl Relay {
    /// Forwards what `host`'s own device sends to it to `far`, and answers back.
    pub fn start(host: Host, far: SocketAddr) -> Self {
        let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let (orders, inbox) = mpsc::channel();
        let (tell, port) = mpsc::channel();
        let log = seen.clone();
        host.on_thread(move || {
            let near = bind();
            tell.send(near.local_addr().unwrap().port()).unwrap();
            let mut outer = bind();
            let mut device: Option<SocketAddr> = None;
            let mut buffer = [0; 65536];
            loop {
                for order in inbox.try_iter() {
                    match order {
                        Order::Send(bytes) => drop(outer.send_to(&bytes, far)),
                        Order::Rebind(told) => {
                            outer = bind();
                            told.send(outer.local_addr().unwrap().port()).unwrap();
                        }
                    }
                }
                while let Ok((n, from)) = near.recv_from(&mut buffer) {
                    device = Some(from);
                    log.lock().unwrap().push(buffer[..n].to_vec());
                    let _ = outer.send_to(&buffer[..n], far);
                }
                while let Ok((n, _)) = outer.recv_from(&mut buffer) {
                    if let Some(device) = device {
                        let _ = near.send_to(&buffer[..n], device);
                    }
                }
            }
        });
        Self { port: port.recv_timeout(DEADLINE).unwrap(), seen, orders }
    }

    /// What the near device has sent so far.
    pub fn seen(&self) -> Vec<Vec<u8>> {
        self.seen.lock().unwrap().clone()
    }

    /// Sends to the far device.
    pub fn send(&self, bytes: &[u8]) {
        self.orders.send(Order::Send(bytes.to_vec())).unwrap();
    }

    /// Moves to another port; returns it.
    pub fn rebind(&self) -> u16 {
        let (told, port) = mpsc::channel();
        self.orders.send(Order::Rebind(told)).unwrap();
        port.recv_timeout(DEADLINE).unwrap()
    }
}

fn bind() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    socket
}
