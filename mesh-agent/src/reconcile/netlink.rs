//! The one rtnetlink socket all reconcilers share.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use futures::stream::{Stream, TryStreamExt};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::Handle;
use tokio::sync::Mutex;

use super::ReconcileError;

/// A link as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// Interface index.
    pub index: u32,
    /// Bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// `IFLA_INFO_KIND`: `wireguard`, `tun`, `veth` …; empty where there is none.
    pub kind: String,
    /// What stands before its packets' IP headers.
    pub layer: LinkLayerType,
}

/// The kind of a link that is WireGuard in the kernel.
pub const WIREGUARD: &str = "wireguard";
/// The kind of a TUN device, which some process drives.
pub const TUN: &str = "tun";

/// Links by name.
pub type Links = BTreeMap<String, LinkState>;

/// A connection to the kernel's routing sockets, in the network namespace of the thread that made it.
#[derive(Debug, Clone)]
pub struct Netlink {
    handle: Handle,
    // A second dump on a socket whose first has not ended is refused with EBUSY.
    dumping: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens the socket and starts the task that serves it. Needs a tokio runtime.
    pub fn connect() -> io::Result<Self> {
        // Strict checking lets the kernel filter dumps by table, so that a router's million foreign
        // routes are not copied out at every pass.
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        tokio::spawn(connection);
        Ok(Self { handle, dumping: Arc::new(Mutex::new(())) })
    }

    /// For single requests.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Collects a dump. A missing table is an empty one (`ENOENT` under strict checking).
    pub async fn dump<T>(
        &self,
        what: &str,
        stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
    ) -> Result<Vec<T>, ReconcileError> {
        let _turn = self.dumping.lock().await;
        match stream.try_collect().await {
            Ok(all) => Ok(all),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(error) => Err(ReconcileError::new(what, describe(&error))),
        }
    }

    /// All links by name.
    pub async fn links(&self) -> Result<Links, ReconcileError> {
        let dump = self.dump("links", self.handle.link().get().execute()).await?;
        Ok(dump.iter().filter_map(parse_link).collect())
    }

    /// One link; `None` where there is none of that name.
    pub async fn link(&self, name: &str) -> Result<Option<LinkState>, ReconcileError> {
        let request = self.handle.link().get().match_name(name).execute();
        match request.try_collect::<Vec<_>>().await {
            Ok(found) => Ok(found.iter().find_map(parse_link).map(|(_, link)| link)),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(ReconcileError::new(format_args!("link {name}"), describe(&error))),
        }
    }
}

fn parse_link(message: &LinkMessage) -> Option<(String, LinkState)> {
    let mut name = None;
    let mut mtu = 0;
    let mut kind = String::new();
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::LinkInfo(infos) => {
                let found = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                kind = found.unwrap_or_default();
            }
            _ => {}
        }
    }
    let up = message.header.flags.contains(LinkFlags::Up);
    Some((
        name?,
        LinkState { index: message.header.index, mtu, up, kind, layer: message.header.link_layer_type },
    ))
}

/// The errno behind an error, positive, if the kernel sent one.
pub fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().saturating_neg()),
        _ => None,
    }
}

/// An error in one line: the system's words and number.
pub fn describe(error: &rtnetlink::Error) -> String {
    match errno(error) {
        Some(number) => io::Error::from_raw_os_error(number).to_string(),
        None => error.to_string(),
    }
}

/// Makes success of the errors that say it is so already.
pub fn settle(
    result: Result<(), rtnetlink::Error>,
    already: &[i32],
    object: impl std::fmt::Display,
) -> Result<(), ReconcileError> {
    match result {
        Ok(()) => Ok(()),
        Err(error) if errno(&error).is_some_and(|number| already.contains(&number)) => Ok(()),
        Err(error) => Err(ReconcileError::new(object, describe(&error))),
    }
}
