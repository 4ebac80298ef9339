//! Programs on devices: TCX links where the kernel has them, else clsact filters.
//!
//! Either way nothing hangs on the agent's life: a TCX link is pinned, a filter belongs to its device. Replacing a program is one
//! atomic step in both.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, SkLookup, TcAttachType};
use aya::sys::SyscallError;

use crate::enforcer::AttachMode;
use crate::error::Error;
use crate::pins::{Attachment, Pins, Via, remove_file};

/// Ahead of whatever else is on the device.
const PRIORITY: u16 = 1;
/// Marks the filter as ours.
const HANDLE: TcHandle = TcHandle::new(0, 4207);

/// Which side of the device a program sits on, seen from the device.
fn side(program: &str) -> TcAttachType {
    match program {
        // Towards a pod is what its host-side veth sends.
        "pod_ingress" | "exit_ethernet" | "exit_ip" => TcAttachType::Egress,
        _ => TcAttachType::Ingress,
    }
}

/// Attaches a program, or puts it in the place of an older one.
pub(crate) fn attach(
    pins: &Pins,
    mode: AttachMode,
    loaded: &mut SchedClassifier,
    program: &'static str,
    ifname: &str,
    ifindex: u32,
) -> Result<(), Error> {
    let failed = |source| Error::attach(program, ifname, source);
    let tcx = Attachment { ifindex, program, via: Via::Tcx };
    let clsact = Attachment { ifindex, program, via: Via::Clsact };
    if replace(pins, loaded, &tcx)? || replace(pins, loaded, &clsact)? {
        return Ok(());
    }
    if mode != AttachMode::Clsact {
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        match loaded.attach_with_options(ifname, side(program), order) {
            Ok(id) => {
                let link: FdLink =
                    loaded.take_link(id).map_err(failed)?.try_into().map_err(Error::link(program, ifname))?;
                let path = pins.attachment(&tcx);
                link.pin(&path).map_err(|source| Error::Pin { path, source: Box::new(source) })?;
                return Ok(());
            }
            Err(error) if mode == AttachMode::Auto && is_unsupported(&error) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    match tc::qdisc_add_clsact(ifname) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(error) => {
            let error = ProgramError::from(error);
            if errno(&error) != Some(libc::EEXIST) {
                return Err(failed(error));
            }
        }
    }
    // The mark first: a filter without one would be nobody's.
    let path = pins.attachment(&clsact);
    loaded.pin(&path).map_err(|source| Error::Pin { path: path.clone(), source: Box::new(source) })?;
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    match loaded.attach_with_options(ifname, side(program), TcAttachOptions::Netlink(options)) {
        Ok(id) => {
            // Dropping it would detach it.
            std::mem::forget(loaded.take_link(id).map_err(failed)?);
            Ok(())
        }
        Err(error) => {
            remove_file(&path)?;
            Err(failed(error))
        }
    }
}

/// Puts a freshly loaded program in the place of an attached one. False if there is none, or if its device has gone.
pub(crate) fn replace(pins: &Pins, loaded: &mut SchedClassifier, of: &Attachment) -> Result<bool, Error> {
    let path = pins.attachment(of);
    let Some(ifname) = crate::enforcer::ifname(of.ifindex) else {
        remove_file(&path)?;
        return Ok(false);
    };
    let failed = |source| Error::attach(of.program, &ifname, source);
    let link: SchedClassifierLink = match of.via {
        Via::Tcx => match PinnedLink::from_pin(&path) {
            Ok(link) => FdLink::from(link).try_into().map_err(Error::link(of.program, &ifname))?,
            Err(LinkError::SyscallError(SyscallError { io_error, .. }))
                if io_error.kind() == ErrorKind::NotFound =>
            {
                return Ok(false);
            }
            Err(error) => return Err(Error::link(of.program, &ifname)(error)),
        },
        Via::Clsact => {
            if !exists(&path)? {
                return Ok(false);
            }
            clsact_link(of, &ifname).map_err(|error| failed(error.into()))?
        }
    };
    match loaded.attach_to_link(link) {
        Ok(id) => {
            let link = loaded.take_link(id).map_err(failed)?;
            match of.via {
                // The pin keeps it.
                Via::Tcx => drop(link),
                // Dropping it would detach it.
                Via::Clsact => std::mem::forget(link),
            }
            Ok(true)
        }
        // The index now is another device's, or the filter went with its qdisc.
        Err(error) if is_gone(&error) => {
            remove_file(&path)?;
            Ok(false)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Takes a program off a device; absent is success.
pub(crate) fn detach(pins: &Pins, of: &Attachment) -> Result<(), Error> {
    let path = pins.attachment(of);
    if of.via == Via::Clsact
        && exists(&path)?
        && let Some(ifname) = crate::enforcer::ifname(of.ifindex)
    {
        let failed = |source| Error::attach(of.program, &ifname, source);
        let link = clsact_link(of, &ifname).map_err(|error| failed(error.into()))?;
        match aya::programs::links::Link::detach(link) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    // A TCX link lives as long as its pin.
    remove_file(&path)
}

/// Attaches the program for the host's sockets to the calling thread's network namespace, then takes an older one away: for a
/// moment there are two, which agree.
pub(crate) fn host(pins: &Pins, loaded: &mut SkLookup) -> Result<(), Error> {
    const NAMESPACE: &str = "/proc/thread-self/ns/net";
    const ON: &str = "the host's sockets";
    let failed = |source| Error::attach(crate::object::HOST, ON, source);
    let namespace = File::open(NAMESPACE).map_err(|source| Error::io("open", NAMESPACE, source))?;
    let id = loaded.attach(namespace).map_err(failed)?;
    let link = FdLink::from(loaded.take_link(id).map_err(failed)?);
    let (path, new) = (pins.host(), pins.host().with_file_name("host_new"));
    remove_file(&new)?;
    link.pin(&new).map_err(|source| Error::Pin { path: new.clone(), source: Box::new(source) })?;
    fs::rename(&new, &path).map_err(|source| Error::io("rename", new, source))
}

fn clsact_link(of: &Attachment, ifname: &str) -> Result<SchedClassifierLink, std::io::Error> {
    SchedClassifierLink::attached(ifname, side(of.program), PRIORITY, HANDLE, None)
}

fn exists(path: &Path) -> Result<bool, Error> {
    path.try_exists().map_err(|source| Error::io("look for", path, source))
}

/// Kernels before 6.6 do not know TCX.
fn is_unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::E2BIG))
}

fn is_gone(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::ENOLINK | libc::ENODEV | libc::ENOENT))
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => io_error.raw_os_error(),
        ProgramError::TcError(TcError::NetlinkError(error)) | ProgramError::NetlinkError(error) => {
            error.raw_os_error()
        }
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}
