// Java's HttpClient: PORT CA_FILE VERSION_OF_HTTP
import java.io.ByteArrayInputStream;
import java.io.FileInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.net.http.WebSocket;
import java.nio.ByteBuffer;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.security.cert.CertificateFactory;
import java.time.Duration;
import java.util.HexFormat;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionStage;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

public class Client {
    static HttpClient client;
    static String authority;

    static String outcome(int status, byte[] body) throws Exception {
        String hash = HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(body));
        return "\"status\": " + status + ", \"length\": " + body.length + ", \"sha256\": \"" + hash + "\"";
    }

    static String ask(String method, String path, BodyPublisher body, String... headers) throws Exception {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create("https://" + authority + path))
            .timeout(Duration.ofSeconds(30)).method(method, body);
        if (headers.length > 0) request.headers(headers);
        var response = client.send(request.build(), BodyHandlers.ofByteArray());
        return outcome(response.statusCode(), response.body());
    }

    static String get(String path, String... headers) throws Exception {
        return ask("GET", path, BodyPublishers.noBody(), headers);
    }

    static String upgrade(byte[] message) throws Exception {
        var received = new CompletableFuture<byte[]>();
        var listener = new WebSocket.Listener() {
            final java.io.ByteArrayOutputStream all = new java.io.ByteArrayOutputStream();

            @Override
            public CompletionStage<?> onBinary(WebSocket socket, ByteBuffer data, boolean last) {
                byte[] part = new byte[data.remaining()];
                data.get(part);
                all.writeBytes(part);
                if (last) received.complete(all.toByteArray());
                socket.request(1);
                return null;
            }
        };
        WebSocket socket = client.newWebSocketBuilder().buildAsync(URI.create("wss://" + authority + "/ws"), listener).get();
        socket.sendBinary(ByteBuffer.wrap(message), true).get();
        byte[] body = received.get(20, TimeUnit.SECONDS);
        socket.abort();
        return outcome(101, body);
    }

    static void run(String name, Callable<String> test) {
        String seen;
        try {
            seen = test.call();
        } catch (Exception error) {
            seen = "\"error\": \"" + error.toString().replaceAll("[^ -~]|[\"\\\\]", "_") + "\"";
        }
        System.out.println("{\"case\": \"" + name + "\", " + seen + "}");
    }

    public static void main(String[] arguments) throws Exception {
        authority = "localhost:" + arguments[0];
        KeyStore store = KeyStore.getInstance(KeyStore.getDefaultType());
        store.load(null, null);
        try (var file = new FileInputStream(arguments[1])) {
            store.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        var trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(store);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);
        client = HttpClient.newBuilder().sslContext(context).version(arguments[2].equals("2") ? HttpClient.Version.HTTP_2 : HttpClient.Version.HTTP_1_1).build();

        byte[] body = new byte[251 * 41780];
        for (int index = 0; index < body.length; index++) body[index] = (byte) (index % 251);
        byte[] message = java.util.Arrays.copyOf(body, 300_000);

        run("get", () -> get("/hello"));
        run("reuse", () -> get("/hello"));
        run("post", () -> ask("POST", "/echo", BodyPublishers.ofByteArray(body)));
        run("chunked", () -> ask("POST", "/echo", BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body))));
        run("head", () -> ask("HEAD", "/hello", BodyPublishers.noBody()));
        run("no_content", () -> get("/204"));
        run("not_modified", () -> get("/304"));
        run("early_hints", () -> get("/hints"));
        run("big_header", () -> get("/hello", "X-Big", "x".repeat(40000)));
        run("slow_body", () -> get("/slow-body"));
        run("early_response", () -> ask("POST", "/early", BodyPublishers.ofByteArray(body)));
        run("dead", () -> get("/dead"));
        run("slow", () -> get("/never"));
        run("cut_length", () -> get("/cut-length"));
        run("cut_chunked", () -> get("/cut-chunked"));
        run("upgrade", () -> upgrade(message));
        System.exit(0);
    }
}
