#![allow(clippy::unwrap_used)]
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::*;

struct Served {
    directory: tempfile::TempDir,
    cancel: CancellationToken,
    board: Board,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

/// Serves in a directory of its own; TCP on a port the kernel chooses.
async fn served(metrics: &str) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    let board = Board::new(&["policy"]);
    let api = Api {
        board: board.clone(),
        store: Store::new(&[]),
        denied: DenyLog::default(),
        metrics: Arc::new(Metrics::default()),
        keys: None,
        pools: None,
    };
    let run_dir = directory.path().to_owned();
    let (metrics, ended) = (metrics.to_owned(), cancel.clone());
    prepare_run_dir(&run_dir).unwrap();
    let task = tokio::spawn(async move { serve(api, &run_dir, &metrics, ended).await });
    let status = directory.path().join("status.sock");
    tokio::time::timeout(Duration::from_secs(10), async {
        while UnixStream::connect(&status).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    Served { directory, cancel, board, task }
}

async fn ask(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Sends bytes that are no request; whatever comes back, or a reset, is fine as long as it ends.
async fn throw(socket: &Path, bytes: &[u8]) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let exchange = async {
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut Vec::new()).await
    };
    let ended = tokio::time::timeout(Duration::from_secs(10), exchange).await;
    assert!(ended.is_ok(), "still open after {} bytes", bytes.len());
}

fn request(method: &str, path: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: margay\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        .into_bytes()
}

#[tokio::test]
async fn both_sockets_read_and_only_control_syncs() {
    let served = served("127.0.0.1:0").await;
    let (control, status) =
        (served.directory.path().join("control.sock"), served.directory.path().join("status.sock"));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&control), mode(&status), mode(served.directory.path())), (0o600, 0o660, 0o750));
    for socket in [&control, &status] {
        for path in
            ["/v1/status", "/v1/peers", "/v1/policies", "/v1/events", "/v1/dump", "/metrics", "/healthz"]
        {
            let answer = ask(socket, &request("GET", path)).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{path}: {answer}");
        }
    }
    let synced = ask(&control, &request("POST", "/v1/sync")).await;
    assert!(synced.ends_with(r#"{"generation":1}"#), "{synced}");
    let refused = ask(&status, &request("POST", "/v1/sync")).await;
    assert!(
        refused.starts_with("HTTP/1.1 403") && refused.ends_with(r#"{"error":"only on control.sock"}"#),
        "{refused}"
    );
    let unready = ask(&status, &request("GET", "/readyz")).await;
    assert!(unready.starts_with("HTTP/1.1 503"), "{unready}");
    served.cancel.cancel();
    served.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn wrong_paths_methods_and_garbage_get_an_error_and_the_next_caller_an_answer() {
    let served = served("127.0.0.1:0").await;
    let status = served.directory.path().join("status.sock");
    let unknown = ask(&status, &request("GET", "/v1/secrets")).await;
    assert!(
        unknown.starts_with("HTTP/1.1 404") && unknown.contains("/v1/secrets does not exist"),
        "{unknown}"
    );
    let method = ask(&status, &request("DELETE", "/v1/status")).await;
    assert!(method.starts_with("HTTP/1.1 405") && method.contains("has no such method"), "{method}");
    let long = [b"GET /".as_slice(), &[b'a'; 100_000], b" HTTP/1.1\r\n\r\n"].concat();
    for garbage in [b"\0\0\0\0".as_slice(), b"GET", b"\r\n\r\n\r\n", &long, &[0xff; 4096]] {
        throw(&status, garbage).await;
    }
    assert!(ask(&status, &request("GET", "/v1/status")).await.starts_with("HTTP/1.1 200"));
    served.cancel.cancel();
    served.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dead_agents_socket_is_replaced_and_a_live_ones_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("status.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = crate::cni::serve::bind(&path, 0o600).unwrap();
    let error = crate::cni::serve::bind(&path, 0o600).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    drop(live);
    crate::cni::serve::bind(&path, 0o600).unwrap();
}

#[tokio::test]
async fn a_taken_metrics_address_is_an_issue_and_the_sockets_still_answer() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let served = served(&taken.local_addr().unwrap().to_string()).await;
    assert_eq!(served.board.observed().all_issues()[0].reason, "MetricsAddressUnavailable");
    let answer = ask(&served.directory.path().join("status.sock"), &request("GET", "/v1/status")).await;
    assert!(answer.contains("MetricsAddressUnavailable"), "{answer}");
    served.cancel.cancel();
    served.task.await.unwrap().unwrap();
}
