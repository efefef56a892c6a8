// The same request for a shell and for Python. A key is named by a variable and never written out.

const base = () => new URL("v1", document.baseURI).href;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(path, body, withKey) {
  const lines = [`curl ${new URL(path, document.baseURI).href}`, "-H 'content-type: application/json'"];
  if (withKey) lines.push('-H "authorization: Bearer $GRAFTWORK_API_KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ") + "\n";
}

export function python(path, body, withKey) {
  const chat = path.includes("chat");
  const key = withKey ? 'os.environ["GRAFTWORK_API_KEY"]' : '"none"';
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("");
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base())}, api_key=${key})
answer = client.${chat ? "chat.completions" : "completions"}.create(
${fields})
print(answer.choices[0].${chat ? "message.content" : "text"})
`;
}
