// openai: chat completions and responses.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { check, collect, messages, model, parameters, Place, question, url, Weather } from './shared.mjs';

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
const chat = { model, messages, temperature: 0, max_tokens: 100 };
const tools = [{ type: 'function', function: { name: 'get_weather', description: 'Look up the weather.', parameters } }];
const response = { model, input: question, temperature: 0, max_output_tokens: 100 };
const tool = { type: 'function', name: 'get_weather', description: 'Look up the weather.', parameters, strict: true };

test('a model is listed', async () => {
  assert.ok((await collect(await client.models.list())).some((each) => each.id === model));
});

test('a chat and its stream', async () => {
  const asked = { ...chat, max_tokens: 24 };
  const whole = await client.chat.completions.create(asked);
  const chunks = await collect(
    await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } }),
  );
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
});

test('a call, its stream and its result', async () => {
  const asked = { ...chat, tools, tool_choice: 'required' };
  const whole = await client.chat.completions.create(asked);
  const calls = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, 'tool_calls');
  assert.ok(calls.length > 0);
  for (const call of calls) check(Place, call.function.arguments);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(
    streamed.choices[0].message.tool_calls.map((call) => call.function.arguments),
    calls.map((call) => call.function.arguments),
  );
  const results = calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: '3 degrees' }));
  const last = await client.chat.completions.create({
    ...chat, max_tokens: 16, tools, tool_choice: 'none', messages: [...messages, whole.choices[0].message, ...results],
  });
  assert.ok(last.choices[0].message.content);
});

test('runTools', async () => {
  const places = [];
  const runner = client.chat.completions.runTools(
    {
      ...chat,
      tool_choice: { type: 'function', function: { name: 'get_weather' } },
      tools: [
        {
          type: 'function',
          function: {
            name: 'get_weather', description: 'Look up the weather.', parameters, parse: JSON.parse,
            function: (place) => {
              places.push(place);
              return '3 degrees';
            },
          },
        },
      ],
    },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  assert.ok(places.length > 0);
  places.forEach((place) => check(Place, place));
});

test('formats of answers', async () => {
  const parsed = await client.chat.completions.parse({ ...chat, response_format: zodResponseFormat(Weather, 'weather') });
  check(Weather, parsed.choices[0].message.parsed);
  const stream = client.chat.completions.stream({ ...chat, response_format: zodResponseFormat(Weather, 'weather') });
  check(Weather, (await stream.finalChatCompletion()).choices[0].message.parsed);
});

test('a response and its stream', async () => {
  const whole = await client.responses.create({ ...response, max_output_tokens: 24 });
  assert.ok(whole.output_text);
  const events = await collect(await client.responses.create({ ...response, max_output_tokens: 24, stream: true }));
  assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
  const text = events.filter((event) => event.type === 'response.output_text.delta').map((event) => event.delta).join('');
  assert.equal(text, whole.output_text);
  const next = await client.responses.create({ ...response, max_output_tokens: 8, previous_response_id: whole.id });
  assert.equal(next.previous_response_id, whole.id);
});

test('a call of a response, its stream and its result', async () => {
  const asked = { ...response, tools: [tool], tool_choice: 'required' };
  const whole = await client.responses.create(asked);
  const calls = whole.output.filter((item) => item.type === 'function_call');
  assert.ok(calls.length > 0);
  for (const call of calls) check(Place, call.arguments);
  const stream = client.responses.stream(asked);
  const final = await stream.finalResponse();
  assert.deepEqual(
    final.output.filter((item) => item.type === 'function_call').map((call) => call.arguments),
    calls.map((call) => call.arguments),
  );
  const input = calls.map((call) => ({ type: 'function_call_output', call_id: call.call_id, output: '3 degrees' }));
  const last = await client.responses.create({
    ...response, max_output_tokens: 16, input, tools: [tool], tool_choice: 'none', previous_response_id: whole.id,
  });
  assert.ok(last.output_text);
});

test('formats of responses', async () => {
  const parsed = await client.responses.parse({ ...response, text: { format: zodTextFormat(Weather, 'weather') } });
  check(Weather, parsed.output_parsed);
});
