//! The kernel's word that links, addresses, routes, rules or neighbours have changed.

use std::io;
use std::sync::Arc;

use futures::StreamExt as _;
use netlink_sys::AsyncSocket as _;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;

/// Room for a burst of events, bytes. More than that is lost, and the timer's business.
const RECEIVE_BUFFER: usize = 1 << 20;

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// Notifies on every event, for as long as the returned future is polled.
pub fn follow(notify: Arc<Notify>) -> io::Result<impl Future<Output = ()>> {
    let (mut connection, _, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
    let socket = connection.socket_mut().socket_mut();
    // Best effort: without CAP_NET_ADMIN in the initial user namespace the system's limit holds.
    let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER);
    Ok(async move {
        let listen = async {
            while messages.next().await.is_some() {
                notify.notify_one();
            }
        };
        tokio::join!(connection, listen);
    })
}
