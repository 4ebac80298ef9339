//! Readiness towards a kubelet, which runs a program and looks at its exit code.

use std::io;
use std::path::Path;

use super::linger::is_served;

/// Why a device is not ready.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// Its process has not come as far.
    #[error("{0}: is not there: the process has not said yet that it is ready")]
    NotYet(String),
    /// Nobody answers on its socket.
    #[error("{0}: nobody answers")]
    Silent(String),
    /// Something could not be looked at.
    #[error("{0}: {1}")]
    Look(String, io::Error),
}

/// Ready is a device whose process has put `file` there, and whose `socket` answers if there is one: on standby there is
/// none.
pub fn probe(file: &Path, socket: &Path) -> Result<(), NotReady> {
    let look = |path: &Path| {
        let name = path.display().to_string();
        move |e| NotReady::Look(name, e)
    };
    if !file.try_exists().map_err(look(file))? {
        return Err(NotReady::NotYet(file.display().to_string()));
    }
    let is_there = socket.try_exists().map_err(look(socket))?;
    if is_there && !is_served(socket).map_err(look(socket))? {
        return Err(NotReady::Silent(socket.display().to_string()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn ready_is_who_has_said_so_and_answers_if_it_serves() {
        let dir = std::env::temp_dir().join(format!("margay-probe-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, socket) = (dir.join("ready"), dir.join("sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(matches!(probe(&file, &socket), Err(NotReady::NotYet(_))));
        std::fs::write(&file, "").unwrap();
        probe(&file, &socket).unwrap();
        drop(listener);
        assert!(matches!(probe(&file, &socket), Err(NotReady::Silent(_))));
        std::fs::remove_file(&socket).unwrap();
        probe(&file, &socket).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
